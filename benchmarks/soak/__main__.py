"""A soak of the core: millions of random events from a seed, with every invariant checked after each of them.

    python -m benchmarks.soak [EVENTS] [--seed N] [--phase N] [--until N]

Four machines of unlike GPUs (one of them with virtual GPUs, whose speeds nobody knows) and a dozen models live through
requests, loads that fail, memory of others, lost GPUs and machines, changed files, restarts of gateway and scheduler.
Each phase is a fresh core under another policy; at its end everything has to come to rest. A violation prints the seed,
the phase, the event and the last events before it; `--phase` repeats one phase alone, `--until` ends it early.

`World` is what is outside of the core: machines, memory, files and the clock. `Clients`, `Processes` and `Mishaps` act
in it. What a command leads to comes later, in events of its own. `Referee` keeps books of its own on what the core was
told and said, and compares. `Play` puts them together.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time

from benchmarks.soak.play import Play
from benchmarks.soak.stage import GC_THRESHOLDS, POLICIES, Tally, shapes
from benchmarks.table import print_table

EVENTS, MOST_PER_PHASE = 10_000_000, 500_000


def run_phase(seed: int, phase: int, events: int) -> Tally:
    began = time.perf_counter()
    play: Play | None = None
    try:
        play = Play(seed, phase)
        for goal in range(0, events, 50_000):
            play.run(min(events, goal + 50_000))
            _progress(phase, play, began)
        play.come_to_rest()
    except Exception as error:
        if play is None:
            raise
        _report_violation(seed, phase, play, error)
        sys.exit(1)
    play.tally.seconds = time.perf_counter() - began
    return play.tally


def _progress(phase: int, play: Play, began: float) -> None:
    tally, taken_s = play.tally, time.perf_counter() - began
    print(
        f"phase {phase}: {tally.events:,} events in {taken_s:.0f} s ({tally.events / taken_s:,.0f}/s), "
        f"{play.world.now / 3600:.1f} h of the clock, {tally.grants:,} grants, {tally.cold_loads:,} loads",
        flush=True,
    )


def _report_violation(seed: int, phase: int, play: Play, error: Exception) -> None:
    print(f"\nVIOLATION at seed {seed}, phase {phase}, event {play.tally.events}: {type(error).__name__}: {error}\n")
    for number, now, event in play.recent:
        print(f"{number:>9} {now:12.3f} {str(event)[:400]}")
    import traceback

    traceback.print_exception(error)
    print(f"\nagain: python -m benchmarks.soak --seed {seed} --phase {phase}", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.splitlines()[0])
    arguments.add_argument("events", nargs="?", type=int, default=EVENTS)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--phase", type=int, help="this phase alone")
    arguments.add_argument("--until", type=int, help="events of a phase, at the most")
    given = arguments.parse_args()
    gc.set_threshold(*GC_THRESHOLDS)
    shapes()
    length = given.until or max(1000, min(MOST_PER_PHASE, given.events // len(POLICIES)))
    total, rows, phase = Tally(), [], given.phase or 0
    while total.events < given.events:
        policy = POLICIES[phase % len(POLICIES)]
        tally = run_phase(given.seed, phase, length)
        words = ", ".join(f"{key} {value}" for key, value in policy.items()) or "default"
        rows.append(tally.row(f"{phase}: {words}"))
        total.add(tally)
        if given.phase is not None:
            break
        phase += 1
    print_table(
        f"Soak with seed {given.seed}",
        ("phase", "events", "events/s", "grants", "refusals", "cold loads", "evictions", "preemptions", "moves",
         "prefetches", "violations"),
        [*rows, total.row("all")],
    )  # fmt: skip
    print("\nloads by tier:", dict(total.tiers.most_common()))
    print("refusals:", dict(total.refused.most_common()))
    print(f"checksum of all decisions: {total.checksum:08x}")


if __name__ == "__main__":
    main()
