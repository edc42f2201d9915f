"""What a soak plays with: machines, models, and a catalogue for each phase."""

from __future__ import annotations

import random
import tempfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from arriero.cli.shapes import read_model
from arriero.example_models import Dimensions, write_example_model
from scheduler import events as ev
from scheduler.cluster.facts import DeviceFacts, NodeFacts
from scheduler.config import Catalogue, parse_catalogue
from scheduler.costs.footprint import footprint
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.params import NO_RATES, ContextParams, Footprint, Layout, Rates
from scheduler.costs.shape import ModelShape
from scheduler.simulation.cards import known_card
from scheduler.units import GIB, MIB, DeviceId, NodeId

SHOWN = 30  # events, after a violation
SELDOM = 100  # events between two looks at what is expensive to look at
STEP_S = 0.02  # of the clock, on average
REST_S = 4000.0  # in which everything has to come to rest
GC_THRESHOLDS = (50_000, 20, 1000)
FAILURES: Sequence[ev.FailureKind] = ("crashed", "crashed", "failed", "failed", "out_of_memory", "out_of_memory")

MODELS = {
    "ant": Dimensions(4, 1024, 8, 4, 4096, 16000),  # 0.05 GiB
    "bee": Dimensions(6, 2048, 16, 4, 8192, 16000),  # 0.2
    "cat": Dimensions(8, 4096, 32, 8, 11008, 32000),  # 1
    "cow": Dimensions(8, 4096, 32, 8, 16384, 32000),  # 1.2
    "dog": Dimensions(12, 4096, 32, 8, 16384, 32000),  # 1.8
    "fox": Dimensions(8, 8192, 64, 8, 16384, 32000),  # 2.7
    "gnu": Dimensions(10, 8192, 64, 8, 28672, 32000),  # 5
    "elk": Dimensions(8, 2048, 16, 4, 4096, 32000, 16, 2),  # 2, of which 1.8 are experts
    "emu": Dimensions(10, 4096, 32, 8, 8192, 32000, 12, 2),  # 7, of which 6.3 are experts
    "owl": Dimensions(12, 8192, 64, 8, 32768, 64000),  # 7
    "ram": Dimensions(6, 4096, 32, 4, 14336, 32000),  # 0.8
    "yak": Dimensions(16, 8192, 64, 8, 40960, 64000),  # 11
}
ENTRIES: dict[str, dict[str, Any]] = {
    "ant": {"n_seq_max": 4, "max_replicas": 3},
    "bee": {"embeddings": True, "kv_unified": True, "n_seq_max": 2},
    "cat": {"min_replicas": 1, "priority": 1},
    "cow": {"min_replicas": 2, "max_replicas": 3, "n_seq_max": 2},
    "dog": {"keep_alive_s": 20.0, "n_seq_max": 2},
    "fox": {"not_with": ["cat", "ant"], "n_ctx": "auto"},
    "gnu": {"near": ["dog"], "n_ctx": 4096},
    "elk": {"n_ctx": 4096, "alternatives": [{"n_ctx": 1024}]},
    "emu": {"keep_alive_s": 90.0, "max_replicas": 1},
    "owl": {"n_ctx": 16384, "alternatives": [{"n_ctx": 4096}, {"n_ctx": 2048, "type_k": "q8_0", "type_v": "q8_0"}]},
    "ram": {"spill": False, "priority": 3, "max_gpus": 1},
}  # yak is known by its file alone
POLICIES: tuple[dict[str, Any], ...] = (
    {},
    {"eviction": "gdsf", "placement": "spread"},
    {"max_active_models": 1, "preempt_after_s": 5.0},
    {"prefetch": "preload", "preempt_after_s": 0.0},
    {"prefetch": "read_ahead", "eviction": "gdsf", "min_residency_s": 0.0, "spill_after_s": 0.0},
    {"max_active_models": 4, "prefetch": "preload", "drain_after_s": 0.0},
    {"placement": "spread", "preempt_after_s": 2.0, "queue_limit": 12, "fair_share_s": 60.0},
    {"eviction": "gdsf", "prefetch": "preload", "preflight": "always", "deadline_s": 60.0},
    {"min_residency_s": 60.0, "drain_after_s": 30.0, "lease_ttl_s": 20.0, "release_timeout_s": 3.0},
    {"max_load_attempts": 1, "preflight": "never", "backoff_s": 1.0, "max_active_models": 2},
)


class Box(NamedTuple):
    """A machine: its GPUs by product and size, or virtual ones of these sizes."""

    name: str
    cards: tuple[str, ...]
    virtual: tuple[int, ...]
    ram_bytes: int
    cores: int
    tells_processes: bool
    files: str  # models that lie there
    build: str = CHECKED_BUILD  # of llama-cpp-python; under another one figures are bounds, and llama.cpp is asked


BOXES = (
    Box("barn", ("RTX 2080 Ti", "RTX 3070"), (), 24 * GIB, 8, True, "ant bee cat cow dog fox gnu elk emu owl ram yak"),
    Box("loft", ("RTX 2060", "GTX 1060"), (), 16 * GIB, 4, False, "ant bee cat cow dog fox gnu elk emu ram", "1"),
    Box("shed", (), (2 * GIB, 2 * GIB, 3 * GIB), 12 * GIB, 3, True, "ant bee cat cow dog elk ram"),
    Box("yard", ("RTX 3050",), (), 8 * GIB, 2, True, "ant cat cow fox elk ram gnu"),
)


class Violation(Exception):
    """Something that must never be."""


@cache
def shapes() -> dict[str, ModelShape]:
    with tempfile.TemporaryDirectory() as folder:
        return {
            name: read_model(write_example_model(Path(folder) / f"{name}.gguf", name, of))
            for name, of in MODELS.items()
        }


@cache
def predicted(model: str, layout: Layout, context: ContextParams) -> Footprint:
    return footprint(shapes()[model], layout, context, CHECKED_BUILD)


def facts_of(box: Box, node_id: NodeId) -> NodeFacts:
    """The machine under a name that Ray gives it anew each time; its GPUs keep theirs."""
    devices = []
    for i, name in enumerate(box.cards):
        card = known_card(name)
        assert card is not None
        device_id, label = DeviceId(f"GPU-{box.name}-{i}"), f"gpu{i}"
        devices.append(DeviceFacts(device_id, node_id, label, name, "cuda", card.total_bytes, card.rates))
    for i, total_bytes in enumerate(box.virtual):
        device_id = DeviceId(f"virtual-{box.name}-{i}")
        devices.append(DeviceFacts(device_id, node_id, f"gpu{i}", "virtual", "rpc", total_bytes))
    rates = NO_RATES if box.virtual else Rates(40e9, 5e11)
    disk = 0.0 if box.virtual else 2e9
    return NodeFacts(
        node_id, box.name, "", box.cores, box.ram_bytes, tuple(devices), rates, disk, llama_build=box.build
    )


def catalogue_of(phase: int, chance: random.Random) -> Catalogue:
    """The phase's policy with some settings by chance, and one model that is pinned. Where only one or two models may
    be loaded, none is to stay for good."""
    by_chance = {"queue_limit": chance.choice((24, 64)), "deadline_s": chance.choice((60.0, 300.0, 600.0))}
    by_chance["request_priority_max"] = chance.choice((0, 5))
    policy = {**by_chance, **POLICIES[phase % len(POLICIES)]}
    pinned = chance.choice(("ant", "dog", "ram"))
    entries = {
        name: {"path": f"/m/{name}.gguf", "pinned": name == pinned, **wishes} for name, wishes in ENTRIES.items()
    }
    if policy.get("max_active_models", 8) <= 2:
        for entry in entries.values():
            entry["pinned"], entry["min_replicas"] = False, 0
    reserves = {"host_bytes": GIB, "cuda_overhead_bytes": 300 * MIB, "gpus": {"loft/gpu0": 200 * MIB}}
    defaults = {"n_seq_max": 2}
    return parse_catalogue({"models": entries, "defaults": defaults, "policy": policy, "reserves": reserves})


@dataclass
class Tally:
    """What happened in a phase."""

    events: int = 0
    seconds: float = 0.0
    grants: int = 0
    cold_loads: int = 0
    evictions: int = 0
    preemptions: int = 0
    moves: int = 0
    prefetches: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    tiers: Counter[str] = field(default_factory=Counter)
    checksum: int = 0  # of all that was decided: equal for equal seeds

    def row(self, name: str) -> tuple[str, ...]:
        speed = f"{self.events / self.seconds:,.0f}" if self.seconds else ""
        counts = (self.grants, self.refused.total(), self.cold_loads, self.evictions, self.preemptions, self.moves)
        return (name, f"{self.events:,}", speed, *(f"{count:,}" for count in (*counts, self.prefetches)), "0")

    def add(self, other: Tally) -> None:
        for name in "events seconds grants cold_loads evictions preemptions moves prefetches".split():
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.tiers.update(other.tiers)
        self.refused.update(other.refused)
        self.checksum = zlib.crc32(str(other.checksum).encode(), self.checksum)
