"""Who hangs is ended, with the reason; who is slow, reads from a disk or slept with the whole machine is not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from beside import Program

from actors.devices.byte_count import Holder
from actors.devices.processes import Look, ray_title, started_at_s, this_process
from actors.devices.pulse import Pulse, sign_in
from actors.devices.virtual import DEVICE_PROCESS
from actors.devices.watchdog import LOOK_EVERY_S, OVERDUE_LOOKS, STOPPED_LOOKS, Watchdog

ME = this_process()
MANY = 100  # looks


class Scene:
    """This process under a watchdog whose clock, kernel and hand are the test's."""

    def __init__(self, folder: Path) -> None:
        self.now = time.monotonic()
        self.stopped, self.major_faults, self.crowding = False, 0, 1.0
        self.killed: list[tuple[int, str]] = []
        self.holders: list[Holder] = []
        self.pulse: Pulse = sign_in("n1", "RunnerActor", "a decode", folder=folder)
        self.watchdog = Watchdog(
            "n1",
            lambda: self.holders,
            folder=folder,
            clock=lambda: self.now,
            crowding=lambda: self.crowding,
            look_at=lambda pid: Look(started_at_s(pid) or 0.0, self.stopped, self.major_faults),
            kill=self._kill,
        )

    def _kill(self, pid: int, started: float, *, titled: str) -> bool:
        self.killed.append((pid, titled))
        return True

    def looks(self, count: int, *, each: Callable[[], object] = lambda: None) -> None:
        for _ in range(count):
            self.now += LOOK_EVERY_S
            each()
            self.watchdog.look()

    @property
    def reason(self) -> str:
        return self.watchdog.reason(*ME.identity)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_nobody_is_ended_who_rests_or_is_in_time(scene: Scene) -> None:
    scene.looks(MANY)
    scene.pulse.promise(MANY * LOOK_EVERY_S * 3)
    scene.looks(MANY)
    assert (scene.killed, scene.reason) == ([], "")


def test_who_stands_still_for_five_seconds_is_ended(scene: Scene) -> None:
    scene.stopped = True
    scene.looks(STOPPED_LOOKS - 1)
    assert not scene.killed
    scene.looks(1)
    assert scene.killed == [(ME.pid, ray_title("RunnerActor"))]
    assert scene.reason == "it stood still for 5 s (stopped by a signal or a debugger)"


def test_who_is_woken_in_between_is_not(scene: Scene) -> None:
    for _ in range(3):
        scene.stopped = True
        scene.looks(STOPPED_LOOKS - 1)
        scene.stopped = False
        scene.looks(1)
    assert not scene.killed


def test_who_is_overdue_in_several_looks_is_ended(scene: Scene) -> None:
    scene.pulse.promise(40.0, usual_s=1.2)
    scene.now += 0.1
    scene.looks(int(40.0 / LOOK_EVERY_S) + OVERDUE_LOOKS - 2)
    assert not scene.killed
    scene.looks(2)
    assert scene.killed == [(ME.pid, ray_title("RunnerActor"))]
    assert scene.reason == "a decode took more than 40 s; the slowest similar one took 1.2 s"


def test_who_keeps_its_word_late_begins_anew(scene: Scene) -> None:
    for _ in range(3):
        scene.pulse.promise(scene.now - time.monotonic())  # due now
        scene.looks(OVERDUE_LOOKS - 1)
        scene.pulse.rest()
        scene.looks(1)
    assert not scene.killed


def test_who_waits_for_a_disk_is_slow_and_does_not_hang(scene: Scene) -> None:
    def read() -> None:
        scene.major_faults += 1

    scene.pulse.promise(0.0)
    scene.looks(MANY, each=read)
    assert not scene.killed
    scene.looks(OVERDUE_LOOKS)
    assert scene.killed


def test_on_a_crowded_machine_everything_may_take_longer(scene: Scene) -> None:
    scene.crowding = 4.0
    scene.pulse.promise(30.0)
    scene.looks(int(120.0 / LOOK_EVERY_S))
    assert not scene.killed
    scene.looks(2 * OVERDUE_LOOKS)
    assert scene.killed
    assert scene.reason == "a decode took more than 120 s"


def test_a_machine_that_slept_ends_nobody_for_it(scene: Scene) -> None:
    scene.pulse.promise(30.0)
    scene.looks(1)
    scene.now += 600.0
    scene.looks(MANY)
    assert not scene.killed
    scene.looks(int(600.0 / LOOK_EVERY_S) - MANY)  # awake, the decode gets as long as the sleep took
    assert not scene.killed
    scene.looks(2 * OVERDUE_LOOKS)
    assert scene.killed


def test_a_device_process_that_stands_still_is_ended_and_its_runner_knows_why(scene: Scene) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as device:
        started = started_at_s(device.pid)
        assert started is not None
        scene.holders = [Holder(device.pid, started, ME.pid, 0)]
        scene.stopped = True
        scene.looks(STOPPED_LOOKS)
        assert (device.pid, re.escape(DEVICE_PROCESS)) in scene.killed
        assert "stood still for 5 s" in scene.watchdog.reason(device.pid, started)
        device.kill()


def test_what_a_runner_died_of_may_be_its_device(scene: Scene) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as device:
        scene.holders = [Holder(device.pid, started_at_s(device.pid) or 0.0, ME.pid, 0)]
        scene.watchdog._look_at = lambda pid: Look(started_at_s(pid) or 0.0, pid == device.pid, 0)
        scene.looks(STOPPED_LOOKS)
        assert scene.killed == [(device.pid, re.escape(DEVICE_PROCESS))]
        assert scene.reason.startswith("its device process stood still for 5 s")
        device.kill()


SIGNED_IN = """
import sys, time
from pathlib import Path
from actors.devices.pulse import sign_in
pulse = sign_in("n1", sys.argv[2], "a decode", folder=Path(sys.argv[1]))
print("signed in", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def titled(beside: Callable[..., Program], tmp_path: Path) -> Iterator[Program]:
    """A process that has signed in and has the title in its command line."""
    program = beside(SIGNED_IN, tmp_path, "RunnerActor", "ray::RunnerActor")
    program.line()
    yield program


def test_the_real_thing(titled: Program, tmp_path: Path) -> None:
    watchdog = Watchdog("n1", folder=tmp_path)
    titled.process.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 30.0
    while titled.process.poll() is None and time.monotonic() < deadline:
        watchdog.look()
        time.sleep(0.01)
    assert titled.process.returncode == -signal.SIGKILL


def test_a_process_that_only_says_it_is_ours_is_left_alone(beside: Callable[..., Program], tmp_path: Path) -> None:
    program = beside(SIGNED_IN, tmp_path, "RunnerActor")  # no such title
    program.line()
    program.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, program.process.pid, os.WSTOPPED | os.WNOWAIT)
    watchdog = Watchdog("n1", folder=tmp_path)
    for _ in range(2 * STOPPED_LOOKS):
        watchdog.look()
    assert program.process.poll() is None
