"""How fast the core decides: a day's worth of requests for forty models on one node of eight unlike GPUs.

Timed is the CPU time of `SchedulerCore.handle` alone, in this process; runners, readings and the clock are played by
the scenario driver of the tests. Loads and stops take no time, so that every request that is not granted at once costs
a whole decision; once on GPUs that do not tell their speed, so that the order of tiers decides, and once on some that
do, so that prices do. Run: python -m benchmarks.decisions
"""

from __future__ import annotations

import importlib
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.table import print_table
from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.costs.params import NO_RATES, Rates

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "core"))
driver: Any = importlib.import_module("scenario")

GPUS = ("8GiB", "8GiB", "12GiB", "12GiB", "16GiB", "16GiB", "24GiB", "24GiB")
SHAPES = (
    (16, 2048, 8192),  # 2 GiB in F16
    (28, 3072, 8192),  # 6 GiB
    (32, 4096, 11008),  # 12 GiB
    (40, 5120, 13824),  # 24 GiB
    (24, 2048, 5632, 8),  # 14 GiB, most of it experts
    (60, 6656, 17920),  # 61 GiB
)
MODELS: dict[str, tuple[int, ...]] = {f"model-{i:02}": SHAPES[i * 7 % len(SHAPES)] for i in range(40)}
REQUESTS = 1000


def main() -> None:
    for priced in (False, True):
        by = "by price" if priced else "by tier"
        print_table(
            f"One core, {len(GPUS)} unlike GPUs, {len(MODELS)} models, {REQUESTS} requests, {by}",
            ("what an event led to", "events", "median ms", "p99 ms", "worst ms", "per second"),
            [_row(kind, times) for kind, times in sorted(mixed_requests(priced=priced).items())],
        )
    print_table(
        "One choice, nothing carried out",
        ("resident replicas", "model asked for", "verdict", "median ms"),
        [row for residents in (0, 10, 40) for row in choices(residents)],
    )


def mixed_requests(*, priced: bool) -> dict[str, list[float]]:
    """Seconds per event, by what it led to. Popularity is Zipf's: some models are hot, most are cold."""
    chance = random.Random(7)
    scenario = _machine(MODELS, priced=priced)
    times = _timed(scenario)
    names, weights = list(MODELS), [1 / (rank + 1) for rank in range(len(MODELS))]
    running: list[str] = []
    for _ in range(REQUESTS):
        running.append(scenario.ask(*chance.choices(names, weights)))
        scenario.wait(0.5)
        if len(running) > 6:
            request = running.pop(chance.randrange(len(running)))
            if request in scenario.grants:
                scenario.done(request)
            else:
                scenario.cancel(request)
    return times


def choices(residents: int) -> list[tuple[str, str, str, str]]:
    """How long `plan` takes, explanation included, with so many idle small replicas in the way."""
    small = {f"small-{i:02}": (8, 1024, 2816) for i in range(residents)}
    wanted = {"6 GiB": SHAPES[1], "24 GiB": SHAPES[3], "61 GiB": SHAPES[5]}
    scenario = _machine({**small, **wanted}, spare="6GiB")
    for name in small:
        scenario.run(name)
    scenario.wait(10)
    rows = []
    for name in wanted:
        times = []
        for _ in range(15):
            began = time.process_time()
            plan = scenario.core.plan(name, None, scenario.now)
            times.append(time.process_time() - began)
        verdict = plan.choice.verdict if plan.choice else "ready"
        rows.append((str(residents), name, verdict, f"{1e3 * statistics.median(times):.1f}"))
    return rows


def _machine(models: dict[str, tuple[int, ...]], spare: str = "0", *, priced: bool = False) -> Any:
    gpus = [driver.gpu(size, f"gpu{i}") for i, size in enumerate(GPUS)]
    rates = NO_RATES
    if priced:
        gpus = [replace(gpu, kind="cuda", rates=Rates(500e9, 20e12)) for gpu in gpus]
        rates = Rates(40e9, 0.5e12)
    reserves = {"reserves": {"gpu_bytes": spare}}
    return driver.Scenario(gpus, models, ram="128GiB", cores=16, catalogue=reserves, rates=rates)


def _timed(scenario: Any) -> dict[str, list[float]]:
    """Time every event that the core handles from now on."""
    times: dict[str, list[float]] = defaultdict(list)
    handle: Callable[..., list[cmd.Command]] = scenario.core.handle

    def timed(event: ev.Event, now: float) -> list[cmd.Command]:
        began = time.process_time()
        commands = handle(event, now)
        times[_outcome(event, commands)].append(time.process_time() - began)
        return commands

    scenario.core.handle = timed
    return times


def _outcome(event: ev.Event, commands: list[cmd.Command]) -> str:
    kinds = {type(command) for command in commands}
    announced = {command.kind for command in commands if isinstance(command, cmd.Announce)}
    if "replica_evicted" in announced:
        return "a placement with evictions"
    if "placed" in announced:
        return "a placement"
    if cmd.GrantLease in kinds:
        return "a slot"
    return "a wait" if isinstance(event, ev.RequestArrived) else f"nothing ({type(event).__name__})"


def _row(kind: str, times: list[float]) -> tuple[Any, ...]:
    ordered = sorted(times)
    p99 = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
    figures = (statistics.median(ordered), p99, ordered[-1])
    return kind, len(times), *(f"{1e3 * seconds:.2f}" for seconds in figures), f"{len(times) / sum(times):.0f}"


if __name__ == "__main__":
    main()
