"""How much of what could lie on GPUs the production core puts there: its packing against the optimum by CP-SAT.

A cluster is made by chance: 1 to 3 machines of 1 to 4 known cards, some of whose memory others use, and a batch of
requests for different models that together want 60 to 160 % of it. The core gets them one after the other, knows
nothing of those to come, and keeps what it has loaded, for everybody stays busy. A packing is worth the bytes of the
files of those models that lie wholly on GPUs. The models have `spill: false`, so that the core plays for the same: one
that is partly in host RAM would take GPUs and count nothing. One row shows what becomes of that.

The optimum knows the whole batch and chooses whom to leave out. It may put every model on one GPU or on some of one
machine in whole layers, at what the production footprint says, and has as much as the core had free. Where the
footprint depends on the split the least is taken: of a compute buffer on one of several GPUs (up to 16 MiB more for
the core), of the logits' on the last (up to 68 MiB). Copies of a model that are split share their layers in one sum. So
it is never less than what can be had, and where CP-SAT runs out of time its bound counts instead of what it found.

An optimum may turn somebody away for the sake of who comes later; a scheduler that loads whatever there is room for
never does. So one row shows how far that rule gets with hindsight about the places: what is lost there is lost by the
order of the requests, and only the rest by the choice of places.

Run: python -m benchmarks.placement [SEED ...]; with seeds, it tells what happened in those clusters.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.packing_cases import (
    CONTEXT,
    Case,
    Costs,
    described,
    kind_of,
    largest_first,
    least_costs,
    random_case,
    read_shapes,
    rooms_of,
    worth_bytes,
)
from benchmarks.table import print_table
from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.cluster.replica import Placement
from scheduler.core import SchedulerCore
from scheduler.costs.footprint import footprint
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.shape import ModelShape
from scheduler.simulation.described import NOW
from scheduler.units import MIB, DeviceId, RequestId, format_bytes

CLUSTERS = 300
SOLVER_S = 3.0
"""After so long the solver's bound is taken."""
FEASIBLE_S, SOLVER_THREADS = 0.5, 2
UNIT_BYTES = MIB // 16
"""The solver counts in these: needs rounded down, room rounded up."""


@dataclass(frozen=True)
class Packing:
    """What became of a batch. `seconds` of the core's CPU time for each request."""

    worth_bytes: int
    placements: Mapping[str, Placement]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Optimum:
    """No packing is worth more than `bound_bytes`; the one found is worth `found_bytes`, as much if that is proved."""

    bound_bytes: int
    found_bytes: int
    seconds: float
    places: tuple[str, ...]
    """What it puts where, in words."""


def main() -> None:
    try:
        solver: Any = importlib.import_module("ortools.sat.python.cp_model")
    except ImportError:
        sys.exit("this benchmark compares with an optimum that OR-tools finds: pip install ortools")
    shapes = read_shapes()
    costs = {kind: least_costs(shape) for kind, shape in shapes.items()}
    seeds = [int(seed) for seed in sys.argv[1:]]
    cases = [random_case(seed, costs) for seed in seeds or range(CLUSTERS)]
    found = [best_packing(solver, case, shapes, costs) for case in cases]
    came = [first_come_packing(solver, *each, shapes, costs) for each in zip(cases, found, strict=True)]
    made = {
        "by chance": [packed_by_core(case, case.batch, shapes, costs) for case in cases],
        "largest first": [packed_by_core(case, largest_first(case, costs), shapes, costs) for case in cases],
        "by chance, host RAM allowed": [packed_by_core(case, case.batch, shapes, costs, spill=True) for case in cases],
    }
    header = (
        *("requests come", "clusters", "mean", "median", "5th percentile", "worst (seed)", "as good as the optimum"),
        *("ms per request, median", "p99"),
    )
    rows = [row for order, packings in made.items() for row in ratio_rows(order, cases, packings, found, costs)]
    rows += ratio_rows("by chance, first come with hindsight", cases, came, found, costs)
    print_table("Bytes of models on GPUs, the core against the optimum", header, rows)
    print(f"\nThe solver: {solver_words(found)}.")
    if seeds:
        for i, case in enumerate(cases):
            tell(case, found[i], {order: packings[i] for order, packings in made.items()})
        return
    for order in ("by chance", "largest first"):
        i = min(range(len(cases)), key=lambda i: ratio(made[order][i], found[i]))
        print(f"\nWorst, {order}:")
        tell(cases[i], found[i], {order: made[order][i]})


# ---------------------------------------------------------------------- the core


def packed_by_core(
    case: Case,
    order: Sequence[str],
    shapes: Mapping[str, ModelShape],
    costs: Mapping[str, Costs],
    *,
    spill: bool = False,
) -> Packing:
    """Each model is asked for, loaded at once, and answers from then on; who would have to wait goes away."""
    core = described(case, shapes, spill=spill).core
    seconds = []
    for name in order:
        began = time.process_time()
        commands = core.handle(ev.RequestArrived(RequestId(name), name), NOW)
        seconds.append(time.process_time() - began)
        _load(core, commands, shapes[kind_of(name)])
        if not any(replica.model == name for replica in core.replicas.values()):
            core.handle(ev.RequestCancelled(RequestId(name)), NOW)
    assert all(replica.busy for replica in core.replicas.values())
    placements = {replica.model: replica.placement for replica in core.replicas.values()}
    on_gpus = [name for name, placement in placements.items() if not placement.computes_on_cpu]
    for name in on_gpus:
        _check_costs(costs[kind_of(name)], placements[name])
    return Packing(worth_bytes(on_gpus, costs), placements, tuple(seconds))


def _load(core: SchedulerCore, commands: Iterable[cmd.Command], shape: ModelShape) -> None:
    """What the commands start is loaded, takes what was predicted in memory and time, and is granted."""
    for command in commands:
        if isinstance(command, cmd.StartReplica):
            placement = command.placement
            buffers = footprint(shape, placement.layout, placement.context, CHECKED_BUILD)
            load_s = core.speeds.predict(shape, placement, None).load.seconds
            core.handle(ev.ReplicaStarted(command.replica_id, 1), NOW)
            core.handle(
                ev.ReplicaReady(command.replica_id, 1, buffers, placement.context.n_ctx, load_s),
                NOW,
            )


def _check_costs(costs: Costs, placement: Placement) -> None:
    """The optimum must not pay more than the core does for the same."""
    assert placement.context == CONTEXT
    *others, last = placement.layers
    if not others:
        assert placement.device_bytes[0] == costs.alone
        return
    for layers, need in zip(others, placement.device_bytes, strict=False):
        assert need >= costs.share + layers * costs.layer
    assert placement.device_bytes[-1] >= costs.share + (last - 1) * costs.layer + costs.output


# ---------------------------------------------------------------------- the optimum


def best_packing(solver: Any, case: Case, shapes: Mapping[str, ModelShape], costs: Mapping[str, Costs]) -> Optimum:
    program = _Program(solver, rooms_of(case, shapes))
    for kind, copies in sorted(Counter(map(kind_of, case.batch)).items()):
        program.add(kind, costs[kind], copies)
    return program.solve()


def first_come_packing(
    solver: Any, case: Case, optimum: Optimum, shapes: Mapping[str, ModelShape], costs: Mapping[str, Costs]
) -> Packing:
    """Nobody is turned away who could be placed with those taken before; where they all lie is found anew each time.
    What is not found in `FEASIBLE_S` counts as not possible."""
    if optimum.found_bytes == worth_bytes(case.batch, costs):
        return Packing(optimum.found_bytes, {}, ())
    rooms = rooms_of(case, shapes)
    taken: list[str] = []
    for name in case.batch:
        program = _Program(solver, rooms)
        for kind, copies in sorted(Counter(map(kind_of, [*taken, name])).items()):
            program.add(kind, costs[kind], copies, all_of_them=True)
        if program.is_possible():
            taken.append(name)
    return Packing(worth_bytes(taken, costs), {}, ())


class _Program:
    """Whole numbers: how many copies of a kind are alone on a GPU, how many are split on a node, and of those how many
    have a share on a GPU, their layers there in all, and how many have their output there. Copies are alike, and so
    only counted."""

    def __init__(self, solver: Any, rooms: Sequence[Mapping[DeviceId, int]]) -> None:
        self._solver = solver
        self._model = solver.CpModel()
        self._rooms = rooms
        self._used: dict[DeviceId, list[Any]] = {device_id: [] for room in rooms for device_id in room}
        self._worth: list[Any] = []
        self._words: list[tuple[str, Any]] = []

    def add(self, kind: str, cost: Costs, copies: int, *, all_of_them: bool = False) -> None:
        placed = []
        for room in self._rooms:
            for device_id in room:
                alone = self._count(copies, f"{kind} on {device_id}")
                self._used[device_id].append(cost.alone // UNIT_BYTES * alone)
                placed.append(alone)
            if len(room) > 1:
                placed.append(self._split(kind, cost, copies, list(room)))
        self._model.add(sum(placed) == copies if all_of_them else sum(placed) <= copies)
        self._worth.append(cost.file_bytes * sum(placed))

    def _split(self, kind: str, cost: Costs, copies: int, devices: Sequence[DeviceId]) -> Any:
        """How many lie on several of these: each has a share on at least two, at most one of them on a device."""
        split = self._count(copies, f"{kind} split on {devices[0].partition('/')[0]}")
        shares, layers, outputs = [], [], []
        for device_id in devices:
            share, output = self._count(copies), self._count(copies)
            there = self._count(copies * cost.n_layers, f"layers of {kind} on {device_id}")
            self._model.add(share <= split)
            self._model.add(output <= share)
            self._model.add(there <= cost.n_layers * share)
            self._model.add(there + output >= share)
            terms = ((cost.share, share), (cost.layer, there), (cost.output, output))
            self._used[device_id] += [count // UNIT_BYTES * times for count, times in terms]
            shares.append(share)
            layers.append(there)
            outputs.append(output)
        self._model.add(sum(shares) >= 2 * split)
        self._model.add(sum(layers) == cost.n_layers * split)
        self._model.add(sum(outputs) == split)
        return split

    def _count(self, most: int, words: str = "") -> Any:
        variable = self._model.new_int_var(0, most, "")
        if words:
            self._words.append((words, variable))
        return variable

    def is_possible(self) -> bool:
        _, status = self._searched(FEASIBLE_S)
        return status in (self._solver.OPTIMAL, self._solver.FEASIBLE)

    def solve(self) -> Optimum:
        self._model.maximize(sum(self._worth))
        began = time.perf_counter()
        search, _ = self._searched(SOLVER_S)
        took = time.perf_counter() - began
        places = tuple(f"{search.value(count)} {what}" for what, count in self._words if search.value(count))
        return Optimum(round(search.best_objective_bound), round(search.objective_value), took, places)

    def _searched(self, seconds: float) -> tuple[Any, Any]:
        for room in self._rooms:
            for device_id, free in room.items():
                self._model.add(sum(self._used[device_id]) <= -(-free // UNIT_BYTES))
        search = self._solver.CpSolver()
        search.parameters.max_time_in_seconds = seconds
        search.parameters.num_workers = SOLVER_THREADS
        return search, search.solve(self._model)


# ---------------------------------------------------------------------- telling


def ratio(packing: Packing, optimum: Optimum) -> float:
    assert packing.worth_bytes <= optimum.bound_bytes, "the yardstick is too short"
    return packing.worth_bytes / optimum.bound_bytes


def ratio_rows(
    order: str, cases: Sequence[Case], made: Sequence[Packing], found: Sequence[Optimum], costs: Mapping[str, Costs]
) -> list[tuple[str, ...]]:
    """All clusters, those in which all models are known to have a place, and those in which they are known not to."""
    wanted = [worth_bytes(case.batch, costs) for case in cases]
    parts = {
        order: [True] * len(cases),
        "... all have a place": [optimum.found_bytes == all_ for optimum, all_ in zip(found, wanted, strict=True)],
        "... not all have one": [optimum.bound_bytes < all_ for optimum, all_ in zip(found, wanted, strict=True)],
    }
    ratios = [
        (case, packing, ratio(packing, optimum)) for case, packing, optimum in zip(cases, made, found, strict=True)
    ]
    chosen = {
        label: [each for each, counts in zip(ratios, part, strict=True) if counts] for label, part in parts.items()
    }
    return [_ratio_row(label, of) for label, of in chosen.items() if of]


def _ratio_row(label: str, of: Sequence[tuple[Case, Packing, float]]) -> tuple[str, ...]:
    ratios = sorted(each for _, _, each in of)
    worst, _, least = min(of, key=lambda each: each[2])
    seconds = sorted(each for _, packing, _ in of for each in packing.seconds)
    return (
        label,
        str(len(of)),
        f"{statistics.mean(ratios):.1%}",
        f"{statistics.median(ratios):.1%}",
        f"{ratios[len(ratios) * 5 // 100]:.1%}",
        f"{least:.1%} ({worst.seed})",
        f"{sum(each > 0.9999 for each in ratios) / len(ratios):.0%}",
        f"{1e3 * statistics.median(seconds):.1f}" if seconds else "",
        f"{1e3 * seconds[len(seconds) * 99 // 100]:.0f}" if seconds else "",
    )


def solver_words(found: Sequence[Optimum]) -> str:
    seconds = [optimum.seconds for optimum in found]
    gaps = [1 - optimum.found_bytes / optimum.bound_bytes for optimum in found]
    unproved = [gap for gap in gaps if gap > 0] or [0.0]
    return (
        f"{statistics.median(seconds):.2f} s at the median, {max(seconds):.1f} s at the most on {SOLVER_THREADS} "
        f"threads; {gaps.count(0)} optima of {len(found)} proved; of the others the bounds count, of "
        f"which all but {statistics.mean(unproved):.1%} was found"
    )


def tell(case: Case, optimum: Optimum, packings: Mapping[str, Packing]) -> None:
    """What there was, and who put what where."""
    print(f"\nSeed {case.seed}:")
    for node in case.cluster.nodes:
        gpus = (f"gpu{i} {gpu.name} {format_bytes(gpu.free or 0)} free" for i, gpu in enumerate(node.gpus))
        print(f"- {node.name}, reads {(node.disk_read or 0) / 1e9:.1f} GB/s: {', '.join(gpus)}")
    print(f"- asked for: {', '.join(case.batch)}")
    for order, packing in packings.items():
        print(f"- the core, {order}: {format_bytes(packing.worth_bytes)}, {ratio(packing, optimum):.1%}")
        for name, placement in packing.placements.items():
            print(f"  - {name} on {_where(placement)}")
        left = [name for name in case.batch if name not in packing.placements]
        print(f"  - without a place: {', '.join(left) or 'none'}")
    print(f"- the optimum: {format_bytes(optimum.bound_bytes)}")
    for place in optimum.places:
        print(f"  - {place}")


def _where(placement: Placement) -> str:
    shares = zip(placement.device_ids, placement.layers, strict=True)
    rest = placement.n_layers - placement.layout.n_gpu_layers
    words = [f"{device_id} ({layers} layers)" for device_id, layers in shares]
    words += [f"{placement.node_id}'s RAM ({rest} layers)"] if rest else []
    words += [f"{placement.node_id}'s RAM (experts)"] if placement.layout.experts_on_host else []
    return ", ".join(words)


if __name__ == "__main__":
    main()
