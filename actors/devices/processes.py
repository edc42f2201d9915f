"""Processes of this machine, identified by more than their pid.

The kernel reuses pids. So a process is identified by its pid and `started_at_s`: the seconds from boot to its start, as
the kernel counts them (exact, and independent of clock changes). A zombie without threads has freed its memory and
counts as gone. Linux only (`/proc`, pidfd). A call takes microseconds.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Process:
    """A process as it describes itself to others: its identity, and the file of its error output."""

    pid: int
    started_at_s: float
    stderr_path: str = ""  # "" where it is no file

    @property
    def identity(self) -> tuple[int, float]:
        return self.pid, self.started_at_s


@dataclass(frozen=True, slots=True)
class Look:
    """What the kernel says about a live process. `stopped`: by a signal or a debugger.

    `major_faults`: pages that it had to wait for, from a disk, since its start.
    """

    started_at_s: float
    stopped: bool
    major_faults: int


def this_process() -> Process:
    """This process, as it describes itself to others."""
    path = os.readlink("/proc/self/fd/2")  # noqa: PTH115 - may be "pipe:[...]"
    return Process(os.getpid(), started_at_s() or 0.0, path if path.startswith("/") else "")


def look_at(pid: int) -> Look | None:
    """A look at process `pid`; None when it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name in parentheses may hold spaces and parentheses itself; the numbered fields follow the last one.
    fields = stat[stat.rindex(")") + 2 :].split()
    state, major_faults, threads, start = fields[0], int(fields[9]), int(fields[17]), int(fields[19])
    # The first thread of a dying process is a zombie while others still hold its memory: the last one's end counts.
    if state in "ZX" and threads <= 1:
        return None
    return Look(start / _TICKS_PER_S, state in "Tt", major_faults)


def started_at_s(pid: int | None = None) -> float | None:
    """Seconds after boot at which process `pid` (this one when None) started; None when it is gone or a zombie."""
    look = look_at(os.getpid() if pid is None else pid)
    return None if look is None else look.started_at_s


def process_alive(pid: int, started: float) -> bool:
    """Whether the process `pid` that started `started` seconds after boot still runs."""
    return started_at_s(pid) == started


def wait_gone(processes: Iterable[tuple[int, float]], timeout_s: float) -> tuple[int, ...]:
    """Block until every (pid, started_at_s) is gone, at most `timeout_s` seconds; returns the pids still alive."""
    deadline = time.monotonic() + timeout_s
    left: dict[int, int] = {}
    poll = select.poll()
    with ExitStack() as open_pidfds:
        for pid, started in processes:
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            open_pidfds.callback(os.close, pidfd)
            # Only now: the pidfd refers to whoever has the pid now, which must be the process that was meant.
            if process_alive(pid, started):
                poll.register(pidfd, select.POLLIN)
                left[pidfd] = pid
        while left:
            ended = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not ended:
                break
            for pidfd, _ in ended:
                poll.unregister(pidfd)
                del left[pidfd]
    return tuple(left.values())


def ray_title(actor: str) -> str:
    """The regular expression for Ray's title of a process of that actor class: with its name while it starts."""
    return rf"ray::([\w-]+:)?{actor}\b"


def kill_process(pid: int, started: float, *, titled: str) -> bool:
    """SIGKILL `pid` if it is that process, belongs to this user and a word of its command line begins with `titled`, a
    regular expression.

    Returns whether the signal was sent; a process that is gone or somebody else's is left alone.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        process = Path(f"/proc/{pid}")
        if not process_alive(pid, started) or process.stat().st_uid != os.geteuid():
            return False
        words = (process / "cmdline").read_bytes().split(b"\0")
        if not any(re.match(titled.encode(), word) for word in words):
            return False
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        return False
    finally:
        os.close(pidfd)
    return True


def sees_host_pids() -> bool:
    """Whether pids here are the machine's own, as drivers report them (False inside a container's pid namespace)."""
    # The first pid namespace has a fixed inode: PROC_PID_INIT_INO in the kernel's include/linux/proc_ns.h.
    return os.stat("/proc/self/ns/pid").st_ino == 0xEFFFFFFC  # noqa: PTH116 - one number, no path handling


def end_with_parent() -> None:
    """From now on this process is killed when its parent's thread that started it ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
