"""Processes are told apart by pid and start, seen to end, and killed only when they are the right ones."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from actors.devices.processes import kill_process, process_alive, ray_title, started_at_s, wait_gone

SLEEP = [sys.executable, "-c", "import sys; sys.stdin.read()"]


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(SLEEP, stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def start_of(child: subprocess.Popen[bytes]) -> float:
    started = started_at_s(child.pid)
    assert started is not None
    return started


def test_a_pid_that_was_handed_out_again_is_somebody_else(child: subprocess.Popen[bytes]) -> None:
    assert process_alive(child.pid, start_of(child))
    assert not process_alive(child.pid, start_of(child) - 0.01)
    assert wait_gone([(child.pid, start_of(child) - 0.01)], timeout_s=0.0) == ()


def test_this_process_started_before_its_child(child: subprocess.Popen[bytes]) -> None:
    own = started_at_s()
    assert own is not None and own == started_at_s(os.getpid())
    assert own <= start_of(child)


def test_a_zombie_is_gone(child: subprocess.Popen[bytes]) -> None:
    identity = (child.pid, start_of(child))
    assert wait_gone([identity], timeout_s=0.0) == (child.pid,)
    child.kill()
    assert wait_gone([identity], timeout_s=20.0) == ()
    assert not process_alive(*identity)
    child.wait()
    assert started_at_s(child.pid) is None


def test_waits_for_all_and_names_those_left() -> None:
    with (
        subprocess.Popen(SLEEP, stdin=subprocess.PIPE) as quick,
        subprocess.Popen(SLEEP, stdin=subprocess.PIPE) as slow,
    ):
        both = [(quick.pid, start_of(quick)), (slow.pid, start_of(slow))]
        quick.kill()
        assert wait_gone(both[:1], timeout_s=20.0) == ()
        assert wait_gone(both, timeout_s=0.01) == (slow.pid,)
        slow.kill()
        assert wait_gone(both, timeout_s=20.0) == ()


def test_kills_only_what_it_was_told_to(child: subprocess.Popen[bytes]) -> None:
    started = start_of(child)
    python = re.escape(sys.executable)
    assert not kill_process(child.pid, started, titled=ray_title("RunnerActor"))
    assert not kill_process(child.pid, started - 0.01, titled=python)
    assert process_alive(child.pid, started)
    assert kill_process(child.pid, started, titled=python)
    assert child.wait(timeout=20) == -signal.SIGKILL
    assert not kill_process(child.pid, started, titled=python)


def test_a_process_of_ray_is_known_by_its_class() -> None:
    title = ray_title("RunnerActor")
    for command in ("ray::RunnerActor", "ray::RunnerActor.generate", "ray::runner-26bbdf28:RunnerActor.__init__"):
        assert re.match(title, command)
    for command in ("ray::OtherRunnerActor", "ray::RunnerActors", "grep ray::RunnerActor", "ray::IDLE"):
        assert not re.match(title, command)
