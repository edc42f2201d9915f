"""The installed llama.cpp is the truth: what it allocates for small models of many architectures, loaded for real."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pytest
from gguf_shapes import SMALL

from scheduler.costs.footprint import effective_context, footprint
from scheduler.costs.ggml_types import KV_TYPES
from scheduler.costs.graph.templates import CHECKED_BUILD, TEMPLATES
from scheduler.costs.params import ContextParams, DeviceSpec, Layout
from scheduler.costs.shape import ModelShape, read_shape
from scheduler.costs.weights import experts_pattern

pytestmark = pytest.mark.llama

CONTEXTS = [
    ContextParams(n_ctx=1024),
    ContextParams(n_ctx=3000, n_seq_max=3, flash_attn="off"),
    ContextParams(n_ctx=2048, n_seq_max=4, n_ubatch=64, kv_unified=True),
    ContextParams(n_ctx=2048, n_ubatch=1024, swa_full=True, embeddings=True),
    ContextParams(n_ctx=512, n_batch=128, type_k="q8_0", type_v="q8_0"),
    ContextParams(n_ctx=0, n_ubatch=128, type_k="bf16", type_v="bf16"),
]


Case = tuple[str, Layout, ContextParams]


def on_devices(*split: float, **more: Any) -> Layout:
    return Layout(tuple(DeviceSpec(f"gpu{i}", "rpc") for i in range(len(split))), -1, split, **more)


def cases_on_the_cpu(name: str) -> list[Case]:
    return [
        (name, Layout(), context)
        for context in CONTEXTS
        if not (name.startswith("deepseek2") and "q8_0" in context.type_k)
    ]


def cases_on_one_device(name: str) -> list[Case]:
    layouts = [on_devices(1), Layout((DeviceSpec("gpu0", "rpc"),), 2, (1,))]
    return [(name, layout, context) for layout in layouts for context in CONTEXTS[:4]]


def cases_on_two_devices(name: str) -> list[Case]:
    layouts = [on_devices(1, 1), on_devices(1, 3), on_devices(5, 1)]
    layouts.append(Layout(layouts[0].devices, 3, (2, 1)))
    if SMALL[name].n_expert:
        layouts.append(on_devices(1, 1, experts_on_host=True))
        layouts.append(on_devices(1, 1, n_cpu_moe=1))
    return [(name, layout, context) for layout in layouts for context in CONTEXTS[:3]]


def cases_on_eight_devices(name: str) -> list[Case]:
    if name not in ("llama", "gemma3", "qwen3moe", "deepseek2", "granitehybrid", "qwen3next", "gemma3n"):
        return []
    layouts = [on_devices(1, 1, 1, 1, 1, 1, 1, 1), on_devices(2, 0, 1, 0, 0, 3, 1, 1)]
    layouts.append(Layout(layouts[0].devices, 4, (1, 0, 1, 0, 1, 1, 0, 1)))
    return [(name, layout, context) for layout in layouts for context in CONTEXTS[:2]]


def ask(
    paths: dict[str, Path],
    cases: list[Case],
    *,
    devices: int,
    real: bool,
    targets: Mapping[str, str] | None = None,
    adapters: Mapping[str, Sequence[Path]] | None = None,
    mtp: bool = False,
) -> list[dict[str, Any]]:
    """What llama.cpp says about each case, all in one process. `targets`: which models are drafts, and for whom.

    `adapters`: the LoRA adapters of models. `mtp`: the context is one for the prediction layers.
    """
    request = {
        "real": real,
        "devices": devices,
        "cases": [
            {
                "path": str(paths[name]),
                "target": str(paths[targets[name]]) if targets and name in targets else None,
                "adapters": [str(path) for path in (adapters or {}).get(name, ())],
                "mtp": mtp,
                "n_gpu_layers": layout.n_gpu_layers,
                "tensor_split": layout.tensor_split,
                "experts_pattern": experts_pattern(layout),
                "context": asdict(context)
                | {"type_k": KV_TYPES[context.type_k].id, "type_v": KV_TYPES[context.type_v].id},
            }
            for name, layout, context in cases
        ],
    }
    program = Path(__file__).with_name("llama_truth.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith("ANSWERS "):
            answers: list[dict[str, Any]] = json.loads(line.removeprefix("ANSWERS "))
            return answers
    raise AssertionError(f"llama.cpp ended with {done.returncode}: {done.stderr[-800:]}")


def compare(case: Case, shape: ModelShape, truth: dict[str, Any], graph: Literal["equal", "not below", "any"]) -> None:
    """Asserts that the footprint of a case is what llama.cpp said of it; `graph`: how its compute buffers compare."""
    _, layout, context = case
    what = f"{case[0]}, {layout}, {context}"
    assert "error" not in truth, f"{what}: {truth}"
    result = footprint(shape, layout, context, CHECKED_BUILD)
    assert truth["n_ctx"] == effective_context(shape, context).n_ctx, what
    assert result.host.output_bytes / 2**20 == pytest.approx(truth["output_mib"], abs=0.0051), what
    got = {f"RPC{i}": device for i, device in enumerate(result.devices)} | {"host": result.host}
    for place, ours in got.items():
        weights, cache, compute = truth["bytes"].get(place, [0, 0, 0])
        assert (ours.weights_bytes, ours.kv_bytes) == (weights, cache), f"{place} of {what}"
        if graph == "equal":
            assert ours.compute_bytes == compute, f"the graph of {case[0]} has changed: {place} of {what}"
        elif graph == "not below":
            assert ours.compute_bytes >= compute, f"{place} of {what}"


@pytest.mark.parametrize(
    ("make", "devices", "real"),
    [
        (cases_on_the_cpu, 0, True),
        (cases_on_one_device, 1, False),
        (cases_on_two_devices, 2, True),
        (cases_on_eight_devices, 8, True),
    ],
    ids=["real loads on the CPU", "one device without allocating", "real loads on two devices", "on eight devices"],
)
def test_footprints_are_what_llama_cpp_allocates(
    make: Callable[[str], list[Case]], devices: int, real: bool, small_models: dict[str, Path]
) -> None:
    cases = [case for name in SMALL for case in make(name)]
    shapes = {name: read_shape(path) for name, path in small_models.items()}
    for case, truth in zip(cases, ask(small_models, cases, devices=devices, real=real), strict=True):
        shape = shapes[case[0]]
        compare(case, shape, truth, "equal" if real and shape.architecture in TEMPLATES else "not below")
