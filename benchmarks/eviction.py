"""What ways of evicting and placing cost on traces of several kinds, against rivals' ways and against hindsight.

Every run is decided by the production core in the simulator. Eight models in Q4_K of 1 to 70 billion parameters share a
machine with 24 and 12 GiB cards. Policies are Arriero's own, and what others do, built here by replacing a rule or two
of the core and leaving it the rest: what is compared is the rule, not the product that it was seen in.

"to the bound" is the ratio of bytes loaded to PFOO-L (`lower_bound`) over the requests as they come; it can be below 1,
for who serves in another order or refuses loads less. "to its order" is the ratio to the optimum for whom a policy
served, in its order; below 1 only by use of host RAM: a model counts with what it takes of the GPUs of the empty
machine. Mean waits count a refused request as one that waited for its whole deadline.

One trace does without the 70B model, which is most of what is waited for; on one machine the disk is slower than the
page cache. Traces in CSV (docs/planning.md) are played as they came and more slowly, models drawn by Zipf's law. With
more to do than the machine can, one early decision changes an hour: several seeds tell a rule from luck.

Run: python -m benchmarks.eviction [--seeds N] [CSV ...]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from arriero.cli.simulate import POLICIES, example_models
from benchmarks.lower_bound import Item, first_loads, optimum, pfoo_l
from benchmarks.table import print_table
from scheduler.choice import search
from scheduler.choice.eviction import Victims
from scheduler.choice.layouts import ONE_GPU, LayoutFamily
from scheduler.choice.offer import Offer
from scheduler.choice.price import Prices
from scheduler.choice.search import GOOD_ENOUGH, Search
from scheduler.choice.tiers import Tier
from scheduler.cluster.replica import Placement, Replica
from scheduler.config import Catalogue, Policy
from scheduler.simulation import report
from scheduler.simulation.described import NOW, DescribedCluster, ModelOnDisk
from scheduler.simulation.description import ClusterDescription, parse_cluster
from scheduler.simulation.report import summary
from scheduler.simulation.simulator import Run, simulate
from scheduler.simulation.trace import Popularity, TraceRequest, made_trace, read_trace
from scheduler.units import NodeId, format_bytes

SEED, REQUESTS = 7, 1000
SLOWER = 10.0, 50.0
"""How many times as far apart the requests of a file come. By ten the machine has still more to do than it can."""
DEFAULT = "lru"
LLAMA_CPP_MODELS = 4
"""Loaded at the same time by llama.cpp's router, unless it is told otherwise."""
OLLAMA_KEEP_ALIVE_S = 300.0
FAST_DISK, SLOW_DISK = "2GB/s", "500MB/s"
TOO_LARGE = "chat-70b"
"""For the GPUs of the machine."""
SAME = 1.01
"""Of the least: whoever has no more is as good."""
COLUMNS = (
    *("trace", "policy", "refused", "cold loads", "loaded", "to the bound", "to its order", "wait p50 s", "p95 s"),
    *("p99 s", "mean, refused as late, s", "tokens/s"),
)
BEST_COLUMNS = (
    *("trace", "first loads", "PFOO-L", "optimum", "least mean wait", f"{DEFAULT} waits", "the least in"),
    *("fewest bytes", f"{DEFAULT} loads"),
)


class Scenario(NamedTuple):
    """Requests, and the machine that they come to."""

    trace: Sequence[TraceRequest]
    cluster: ClusterDescription


class Memory(NamedTuple):
    """A machine as `lower_bound` sees it."""

    items: Mapping[str, Item]
    memory_bytes: int


class Figures(NamedTuple):
    """What one way came to in one scenario, or in several."""

    refused: int
    cold_loads: int
    loaded_bytes: int
    order_bytes: int
    """The least for whom it served, in its order."""
    waits_s: Sequence[float]
    """Of whom it served."""
    mean_waits_s: Sequence[float]
    """By scenario, refused requests counted as late."""
    tokens_per_s: float


class Hindsight(NamedTuple):
    """The least that could have been loaded for a trace, three times."""

    first_bytes: int
    bound_bytes: int
    optimum_bytes: int


# ---------------------------------------------------------------------- policies and rivals

Patch = AbstractContextManager[Any]


@dataclass(frozen=True)
class Way:
    """A way of evicting and placing: what it changes in the catalogue, and rules of the core's that it replaces."""

    policy: Mapping[str, Any]
    keep_alive_s: float | None = None
    rules: Callable[[], Sequence[Patch]] = tuple
    rival: bool = False

    def play(self, settings: Catalogue, models: dict[str, ModelOnDisk], scenario: Scenario) -> Run:
        changes = {
            "policy": Policy.model_validate(settings.policy.model_dump() | dict(self.policy)),
            "defaults": settings.defaults.model_copy(update={"keep_alive_s": self.keep_alive_s}),
        }
        with ExitStack() as until_played:
            for rule in self.rules():
                until_played.enter_context(rule)
            return simulate(scenario.cluster, settings.model_copy(update=changes), models, scenario.trace)


def _goes_first(key: Callable[[Replica], Any]) -> Patch:
    """Regrets that say who goes first and nothing else: each is more than all before it together, and all are too small
    to count among seconds."""

    def regret_s(prices: Prices, replica: Replica, now: float) -> float:
        order = sorted(prices.replicas.values(), key=key)
        return float(1e-6 * 2.0 ** order.index(replica))

    return patch.object(Prices, "regret_s", regret_s)


def by_count() -> Sequence[Patch]:
    """llama.cpp's router: at most so many models are loaded, and the least recently used one makes room, be it small or
    large, quick or slow to load. (That one does not look at memory at all; here a model that finds no room evicts.)"""
    return (_goes_first(lambda replica: (replica.last_used_at, replica.replica_id)),)


def keep_alive_order() -> Sequence[Patch]:
    """Ollama: idle models are unloaded after a while; when room is needed before, the one with the shortest keep-alive
    is, and it is tried again. All have the same here: so by name, whatever their size, and wherever they lie."""
    return (
        _goes_first(lambda replica: (replica.model, replica.replica_id)),
        patch.object(search, "cheapest_victims", _one_after_another),
        patch.object(Search, "_in_the_way", lambda places, candidate, removable, enough: removable),
    )


def _one_after_another(
    replicas: Sequence[Replica],
    regret: Callable[[Replica], float],
    solve: Callable[[Victims], Placement | None],
) -> tuple[Placement, Victims] | None:
    ids = [replica.replica_id for replica in sorted(replicas, key=regret)]
    for count in range(len(ids) + 1):
        victims = frozenset(ids[:count])
        if (placement := solve(victims)) is not None:
            return placement, victims
    return None


def largest_free_gpu() -> Sequence[Patch]:
    """Many simple schedulers: a model goes to the GPU with the most free memory, and if it has too little, others are
    evicted there; to the next one only where it could not fit at all."""
    free, make_room = Search._best_free, Search.make_room

    def best_free(search: Search, tier: Tier) -> Offer | None:
        return search._roomiest_free(tier) if tier.name == ONE_GPU else free(search, tier)

    def make_most_room(
        search: Search, tier: Tier, removable: Sequence[Replica], share: float = GOOD_ENOUGH
    ) -> Offer | None:
        if tier.name != ONE_GPU:
            return make_room(search, tier, removable, share)

        def free_bytes(candidate: LayoutFamily) -> int:
            return search._now(candidate.node_id).devices.get(candidate.devices[0].device_id, 0)

        everybody = search.situation.outgrown.union(replica.replica_id for replica in removable)
        roomiest_first = sorted(tier, key=free_bytes, reverse=True)
        cleared = (search._without(candidate.node_id, everybody) for candidate in roomiest_first)
        each = zip(roomiest_first, cleared, strict=True)
        made = (search._with_victims(candidate, removable, room, share) for candidate, room in each)
        return next(filter(None, made), None)

    return patch.object(Search, "_best_free", best_free), patch.object(Search, "make_room", make_most_room)


WAYS = {
    **{name: Way(changes) for name, changes in POLICIES.items()},
    "by count": Way({"max_active_models": LLAMA_CPP_MODELS}, rules=by_count, rival=True),
    "keep-alive order": Way({}, OLLAMA_KEEP_ALIVE_S, keep_alive_order, rival=True),
    "largest free GPU": Way({}, rules=largest_free_gpu, rival=True),
}


# ---------------------------------------------------------------------- scenarios


def scenarios(models: list[str], files: list[str], seed: int) -> dict[str, Scenario]:
    """By name; the first requests of each file."""
    fast, slow = machine(FAST_DISK), machine(SLOW_DISK)
    small = [name for name in models if name != TOO_LARGE]
    steady, drifting = Popularity(models), Popularity(models, drift_s=1800)
    found = {
        "steady Zipf": Scenario(made_trace(steady, seed, n_requests=REQUESTS, mean_gap_s=20), fast),
        "drifting Zipf": Scenario(made_trace(drifting, seed, n_requests=REQUESTS, mean_gap_s=20), fast),
        "drifting Zipf, slow disk": Scenario(made_trace(drifting, seed, n_requests=REQUESTS, mean_gap_s=20), slow),
        "even": Scenario(made_trace(Popularity(models, 0.0), seed, n_requests=REQUESTS, mean_gap_s=40), fast),
        "even, all fit": Scenario(made_trace(Popularity(small, 0.0), seed, n_requests=REQUESTS, mean_gap_s=20), fast),
        "bursts": Scenario(made_trace(steady, seed, n_requests=REQUESTS, mean_gap_s=20, burst=16), fast),
    }
    for file in files:
        with Path(file).open(newline="", encoding="utf-8") as lines:
            first = read_trace(lines, steady, seed, file)[:REQUESTS]
        name = Path(file).stem
        found[name] = Scenario(first, fast)
        found |= {f"{name}, {times:g} times slower": Scenario(stretched(first, times), fast) for times in SLOWER}
    return found


def machine(disk_read: str) -> ClusterDescription:
    gpus = [{"name": "RTX 3090"}, {"name": "RTX 3060"}]
    return parse_cluster({"nodes": [{"name": "box", "ram": "64GiB", "disk_read": disk_read, "gpus": gpus}]})


def stretched(trace: Iterable[TraceRequest], times: float) -> list[TraceRequest]:
    """The same requests, `times` as far apart."""
    return [replace(request, at_s=times * request.at_s) for request in trace]


# ---------------------------------------------------------------------- figures


def one_memory(settings: Catalogue, models: dict[str, ModelOnDisk]) -> Memory:
    """What the core has free on the empty machine, and what each model would take of it in its best place there."""
    cluster = machine(FAST_DISK)
    core = DescribedCluster(cluster, settings, models).core
    free = [core.rooms.now(NodeId(node.name)).devices for node in cluster.nodes]
    items = {}
    for name, model in models.items():
        choice = core.plan(name, None, NOW).choice
        assert choice is not None
        assert choice.placement is not None
        items[name] = Item(sum(choice.placement.device_bytes), model.shape.file_bytes)
    return Memory(items, sum(sum(devices.values()) for devices in free))


def hindsight(trace: Sequence[TraceRequest], memory: Memory) -> Hindsight:
    asked = [request.model for request in trace]
    return Hindsight(first_loads(asked, memory.items), pfoo_l(asked, *memory), optimum(asked, *memory))


def figures(run: Run, deadline_s: float, memory: Memory) -> Figures:
    told = summary(run, "", 0)
    served = sorted((o.granted_s, i) for i, o in enumerate(run.outcomes) if o.granted_s is not None)
    order = [run.outcomes[i].request.model for _, i in served]
    waits_s = report.waits_s(run)
    late_s = deadline_s * (len(run.outcomes) - len(waits_s))
    return Figures(
        *(told["refused"], run.cold_loads, run.bytes_loaded, optimum(order, *memory)),
        *(waits_s, [(sum(waits_s) + late_s) / len(run.outcomes)], told["tokens_per_s"]),
    )


def together(every: Sequence[Figures]) -> Figures:
    """Of scenarios with as many requests each."""
    return Figures(
        refused=sum(each.refused for each in every),
        cold_loads=sum(each.cold_loads for each in every),
        loaded_bytes=sum(each.loaded_bytes for each in every),
        order_bytes=sum(each.order_bytes for each in every),
        waits_s=[wait_s for each in every for wait_s in each.waits_s],
        mean_waits_s=[mean_s for each in every for mean_s in each.mean_waits_s],
        tokens_per_s=statistics.fmean(each.tokens_per_s for each in every),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eviction")
    parser.add_argument("--seeds", type=int, default=1, help="how many traces of each kind are made")
    parser.add_argument("traces", nargs="*", metavar="CSV", help="requests with arrival times and lengths")
    asked = parser.parse_args()
    settings, models = example_models()
    memory = one_memory(settings, models)
    rows: list[tuple[str, ...]] = []
    best: list[tuple[str, ...]] = []
    seeds = range(SEED, SEED + asked.seeds)
    by_seed = [scenarios(list(models), asked.traces, seed) for seed in seeds]
    for kind in by_seed[0]:
        alike = [scenarios_of_seed[kind] for scenarios_of_seed in by_seed]
        least = Hindsight(*map(sum, zip(*(hindsight(each.trace, memory) for each in alike), strict=True)))
        found = {}
        for name, way in WAYS.items():
            runs = (way.play(settings, models, each) for each in alike)
            found[name] = together([figures(run, settings.policy.deadline_s, memory) for run in runs])
        rows += (row(kind, name, each, least) for name, each in found.items())
        best.append(who_is_best(kind, found, least))
    which = f"seed {SEED}" if len(seeds) == 1 else f"seeds {SEED} to {seeds[-1]}"
    title = f"Eviction, {len(models)} models on 24 + 12 GiB, simulated, {which}; * a rival's way"
    print_table(title, COLUMNS, rows)
    print_table(f"Who is best (to {SAME - 1:.0%}), and {DEFAULT}, the default, beside it", BEST_COLUMNS, best)


def row(kind: str, name: str, found: Figures, least: Hindsight) -> tuple[str, ...]:
    waits_s = report.quantiles(found.waits_s)
    return (
        *(kind, name + "*" * WAYS[name].rival, str(found.refused), str(found.cold_loads)),
        *(format_bytes(found.loaded_bytes), f"{found.loaded_bytes / least.bound_bytes:.2f}"),
        f"{found.loaded_bytes / found.order_bytes:.2f}" if found.order_bytes else "",
        *(f"{waits_s[quantile]:.1f}" for quantile in ("p50", "p95", "p99")),
        *(f"{statistics.fmean(found.mean_waits_s):.1f}", f"{found.tokens_per_s:.1f}"),
    )


def who_is_best(kind: str, found: Mapping[str, Figures], least: Hindsight) -> tuple[str, ...]:
    waits_s = {name: statistics.fmean(each.mean_waits_s) for name, each in found.items()}
    loaded = {name: float(each.loaded_bytes) for name, each in found.items()}
    each_seed = list(zip(*(each.mean_waits_s for each in found.values()), strict=True))
    as_good = [mine <= SAME * min(all_s) for mine, all_s in zip(found[DEFAULT].mean_waits_s, each_seed, strict=True)]
    return (
        *(kind, format_bytes(least.first_bytes), format_bytes(least.bound_bytes), format_bytes(least.optimum_bytes)),
        *(f"{_least(waits_s)}: {min(waits_s.values()):.1f} s", _beside(waits_s), f"{sum(as_good)} of {len(as_good)}"),
        *(f"{_least(loaded)}: {format_bytes(int(min(loaded.values())))}", _beside(loaded)),
    )


def _least(values: Mapping[str, float]) -> str:
    """Who has the least, or about as much."""
    most = SAME * min(values.values())
    return ", ".join(name + "*" * WAYS[name].rival for name, value in values.items() if value <= most)


def _beside(values: Mapping[str, float]) -> str:
    """How much more than the least the default has."""
    least = min(values.values())
    if values[DEFAULT] <= SAME * least:
        return "as good"
    return f"{values[DEFAULT] / least - 1:+.0%}" if least else "more"


if __name__ == "__main__":
    main()
