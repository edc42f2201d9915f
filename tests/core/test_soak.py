"""A soak of 35,000 random events: every policy for a while, with every invariant checked after each event.

The same as `python -m benchmarks.soak`, shorter and from one seed. A violation ends it: `run_phase` prints what came
before, and how to repeat it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak.__main__ import run_phase
from benchmarks.soak.stage import POLICIES
from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.core import SchedulerCore

EVENTS = 35_000
SLOW = {2, 3, 5, 8, 9}
"""Phases that take longer than the others together."""
SEED = 7
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "phase", [pytest.param(phase, marks=pytest.mark.slow if phase in SLOW else ()) for phase in range(len(POLICIES))]
)
def test_no_invariant_breaks(phase: int) -> None:
    tally = run_phase(SEED, phase, EVENTS // len(POLICIES))
    assert tally.events >= EVENTS // len(POLICIES)
    assert tally.grants and tally.cold_loads, "it has tried too little"


def test_a_core_that_forgets_a_request_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The soak would see it: else nothing that it says is worth anything."""
    handle, refusals = SchedulerCore.handle, 0

    def forgetful(core: SchedulerCore, event: ev.Event, now: float) -> list[cmd.Command]:
        nonlocal refusals
        commands = handle(core, event, now)
        refusals += sum(isinstance(command, cmd.RefuseRequest) for command in commands)
        if refusals >= 5:
            commands = [command for command in commands if not isinstance(command, cmd.RefuseRequest)]
        return commands

    monkeypatch.setattr(SchedulerCore, "handle", forgetful)
    with pytest.raises(SystemExit) as ended:
        run_phase(SEED, 0, 5_000)
    assert ended.value.code == 1


@pytest.mark.slow
def test_decisions_do_not_depend_on_the_order_of_hashes() -> None:
    """Sets of names are walked in another order in every process; what is decided must be the same in all.

    In these phases, victims were once stopped in the order of a set."""
    imported = "from benchmarks.soak.__main__ import run_phase"
    code = f"{imported}; print([run_phase(12, phase, 9_000).checksum for phase in (3, 6)])"
    said = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for hash_seed in ("0", "1", "2")
    ]
    sums = {each.communicate()[0].splitlines()[-1] for each in said}
    assert len(sums) == 1 and sums != {""}
