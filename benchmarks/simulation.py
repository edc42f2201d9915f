"""How many events a second the simulator plays on one core: models that all fit, and models that are swapped.

Both play the requests of a trace (docs/planning.md) by eight models of 1 to 70 billion parameters: on eight H100; and
the first `SWAPPED` of them ten times as far apart, without the largest model, on cards of 24 and 12 GiB. CPU time of
this process, the best of `RUNS`. Run: python -m benchmarks.simulation CSV
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from arriero.cli.simulate import example_models
from benchmarks.table import print_table
from scheduler.simulation.description import parse_cluster
from scheduler.simulation.simulator import Run, simulate
from scheduler.simulation.trace import Popularity, TraceRequest, read_trace

SEED, RUNS, SWAPPED, TIMES, TOO_LARGE = 7, 3, 1000, 10.0, "chat-70b"
H100S = [{"name": f"n{i}", "ram": "128GiB", "gpus": [{"name": "H100"}] * 4} for i in range(2)]
SMALL = [{"name": "box", "ram": "64GiB", "disk_read": "2GB/s", "gpus": [{"name": "RTX 3090"}, {"name": "RTX 3060"}]}]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("python -m benchmarks.simulation CSV: the trace to play")
    _, models = example_models()
    small = [name for name in models if name != TOO_LARGE]
    spread = [replace(each, at_s=TIMES * each.at_s) for each in trace(sys.argv[1], small)[:SWAPPED]]
    rows = [row("all fit", H100S, trace(sys.argv[1], list(models))), row("swapped", SMALL, spread)]
    print_table("The simulator", ("models", "requests", "cold loads", "events", "CPU s", "events/s"), rows)


def trace(path: str, models: list[str]) -> list[TraceRequest]:
    with Path(path).open(newline="", encoding="utf-8") as lines:
        return read_trace(lines, Popularity(models, 1.0), SEED, path)


def row(label: str, nodes: list[dict[str, Any]], requests: Sequence[TraceRequest]) -> tuple[str, ...]:
    settings, models = example_models()
    seconds, run = [], Run([])
    for _ in range(RUNS):
        began = time.process_time()
        run = simulate(parse_cluster({"nodes": nodes}), settings, models, requests)
        seconds.append(time.process_time() - began)
    best_s = min(seconds)
    figures = (len(requests), run.cold_loads, run.events)
    return (label, *(f"{each:,}" for each in figures), f"{best_s:.2f}", f"{run.events / best_s:,.0f}")


if __name__ == "__main__":
    main()
