"""What each eviction policy costs on traces of several kinds, decided by the production core in the simulator.

One row per trace and policy: cold loads, bytes loaded, and quantiles of the wait for a slot. Eight models in Q4_K of 1
to 70 billion parameters share a machine with 24 and 12 GiB cards. Traces with real arrival times and lengths can be
given (CSV as in docs/planning.md); models are then drawn by Zipf's law. Run: python -m benchmarks.eviction [CSV ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from arriero.cli.simulate import POLICIES, example_models
from benchmarks.table import print_table
from scheduler.config import Policy
from scheduler.simulation.description import parse_cluster
from scheduler.simulation.report import summary
from scheduler.simulation.simulator import simulate
from scheduler.simulation.trace import Popularity, TraceRequest, made_trace, read_trace
from scheduler.units import format_bytes

SEED, REQUESTS = 7, 1000
CLUSTER = parse_cluster(
    {
        "nodes": [
            {"name": "box", "ram": "64GiB", "disk_read": "2GB/s", "gpus": [{"name": "RTX 3090"}, {"name": "RTX 3060"}]}
        ]
    }
)


def main() -> None:
    settings, models = example_models()
    rows = []
    for kind, trace in traces(list(models), sys.argv[1:]).items():
        for policy, changes in POLICIES.items():
            changed = settings.model_copy(
                update={"policy": Policy.model_validate(settings.policy.model_dump() | changes)}
            )
            told = summary(simulate(CLUSTER, changed, models, trace), policy, SEED)
            waits = (f"{told['wait_s'][name]:.1f}" for name in ("p50", "p95", "p99"))
            loaded = format_bytes(told["bytes_loaded"])
            rows.append((kind, policy, told["refused"], told["cold_loads"], loaded, *waits))
    header = ("trace", "policy", "refused", "cold loads", "loaded", "wait p50 s", "p95 s", "p99 s")
    print_table(f"Eviction, {len(models)} models on 24 + 12 GiB, simulated, seed {SEED}", header, rows)


def traces(models: list[str], files: list[str]) -> dict[str, list[TraceRequest]]:
    """By kind; the first requests of each file."""
    found = {
        "steady Zipf": made_trace(Popularity(models), SEED, n_requests=REQUESTS, mean_gap_s=20),
        "drifting Zipf": made_trace(Popularity(models, drift_s=1800), SEED, n_requests=REQUESTS, mean_gap_s=20),
        "even": made_trace(Popularity(models, 0.0), SEED, n_requests=REQUESTS, mean_gap_s=40),
        "bursts": made_trace(Popularity(models), SEED, n_requests=REQUESTS, mean_gap_s=20, burst=16),
    }
    for file in files:
        with Path(file).open(newline="", encoding="utf-8") as lines:
            found[Path(file).stem] = read_trace(lines, Popularity(models), SEED, file)[:REQUESTS]
    return found


if __name__ == "__main__":
    main()
