"""The heartbeat of a process: a deadline for its next sign of life, which the node's watchdog reads.

Every process of ours registers on its node with a small file, in a folder that only its user can open. The file says
which process it is, what it is doing, and by when that must be done. It is mapped into memory. So a promise is one
write of 24 bytes, which takes half a microsecond, and can be made before and after every decode.

Times are seconds of CLOCK_MONOTONIC, which all processes of a machine share. Whoever reads the files removes those of
dead processes. Containers may share the folder but not the pids: processes of another pid namespace are skipped.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import os
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from actors.devices.processes import process_alive, this_process

LOOP_EVERY_S, LOOP_WITHIN_S = 1.0, 30.0
"""For an event loop: it renews its promise every second. The scheduler's longest decision takes less than a second."""

_HEAD = struct.Struct("<8sqd")  # magic; pid, started_at_s
_PROMISE = struct.Struct("<ddd")  # due_at, allowed_s, usual_s
_TEXT = struct.Struct("<32s64s")  # title, what
_SIZE = _HEAD.size + _PROMISE.size + _TEXT.size
_MAGIC = b"ARRIEROp"

log = logging.getLogger(__name__)
_serial = itertools.count()


@dataclass(frozen=True, slots=True)
class Promise:
    """What one pulse said last. `due_at` 0: nothing is due. `usual_s` 0: it is not known how long this takes."""

    pid: int
    started_at_s: float
    title: str  # Ray's for the process, "RunnerActor"
    what: str  # what is under way: "a decode"
    due_at: float
    allowed_s: float
    usual_s: float


class Pulse:
    """One line of work of this process. Cheap, and safe to use from the one thread that does the work."""

    def __init__(self, memory: mmap.mmap | bytearray) -> None:
        self._memory = memory

    def promise(self, within_s: float, usual_s: float = 0.0) -> None:
        """Promise the next sign of life within `within_s`. `usual_s`: the longest that this has taken so far."""
        _PROMISE.pack_into(self._memory, _HEAD.size, time.monotonic() + within_s, within_s, usual_s)

    def rest(self) -> None:
        """Nothing is due until the next promise."""
        _PROMISE.pack_into(self._memory, _HEAD.size, 0.0, 0.0, 0.0)


def sign_in(node_id: str, title: str, what: str, *, folder: Path | None = None) -> Pulse:
    """Register this process on its node. `title` is its actor class, `what` its work, such as "a decode".

    If the file cannot be written, the process is not watched, and logs a warning.
    """
    process = this_process()
    at = pulse_folder() if folder is None else folder
    try:
        private_folder(at)
        file = at / f"{pids_of()}-{node_id}-{process.pid}-{next(_serial)}"
        content = _HEAD.pack(_MAGIC, *process.identity) + _PROMISE.pack(0.0, 0.0, 0.0)
        content += _TEXT.pack(title.encode(), what.encode())
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.write(fd, content)  # in one piece: readers find all of it or nothing
            memory = mmap.mmap(fd, _SIZE)
        finally:
            os.close(fd)
    except OSError as error:
        log.warning("%s is not watched: no heartbeat in %s: %s", title, at, error)
        return Pulse(bytearray(_SIZE))
    return Pulse(memory)


def promises(node_id: str, *, folder: Path | None = None) -> Iterator[Promise]:
    """The latest promises of all live processes of that node. Files of dead processes are removed."""
    at = pulse_folder() if folder is None else folder
    try:
        private_folder(at)
        ours = pids_of()
        names = [name for name in os.listdir(at) if name.startswith(f"{ours}-")]  # noqa: PTH208 - names suffice
    except OSError:
        return
    for name in names:
        file = at / name
        try:
            content = file.read_bytes()
        except OSError:
            continue
        if len(content) != _SIZE or not content.startswith(_MAGIC):
            continue
        _, pid, started_at_s = _HEAD.unpack_from(content)
        if not process_alive(pid, started_at_s):
            file.unlink(missing_ok=True)
        elif name.startswith(f"{ours}-{node_id}-"):
            title, what = (text.rstrip(b"\0").decode() for text in _TEXT.unpack_from(content, _SIZE - _TEXT.size))
            yield Promise(pid, started_at_s, title, what, *_PROMISE.unpack_from(content, _HEAD.size))


def pulse_folder() -> Path:
    """Where all processes of this user on this machine register."""
    return Path(tempfile.gettempdir()) / f"arriero-pulse-{os.getuid()}"


def pids_of() -> int:
    """Names the pid namespace."""
    return os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116 - one number, no path handling


def private_folder(folder: Path) -> None:
    """Make the folder. Raises PermissionError where somebody else could write what is read there."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:  # a link counts as open to all
        raise PermissionError(f"other users can write to {folder}: remove it")
