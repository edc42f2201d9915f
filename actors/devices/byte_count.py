"""The memory count of one virtual GPU: a small file that all its device processes share.

The file is a table with a row per device process: its identity, the runner that it works for, and the bytes that it
holds. Every change is one write of 40 bytes under an exclusive `flock`. So a process that is killed at any moment
leaves a valid table. A dead process holds nothing: readers skip its row, and writers reuse it. The sum over live
processes never exceeds the capacity, which the callers pass in. An operation takes some 30 microseconds.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from actors.devices.processes import process_alive, started_at_s
from scheduler.errors import InvariantBroken

_MAGIC = b"ARRIEROv"
_ROW = struct.Struct("<qdqQ8x")  # device process: pid, started_at_s; runner pid; bytes held


@dataclass(frozen=True, slots=True)
class Holder:
    """A live device process, the runner it works for, and the bytes it holds on the virtual GPU."""

    pid: int
    started_at_s: float
    owner_pid: int
    held_bytes: int


class ByteCount:
    """The shared count at `path`. Raises FileNotFoundError when `create` was never called for it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | Path) -> ByteCount:
        """Make an empty count, or keep an existing one: its holders may still be running."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_size == 0:
                os.pwrite(fd, _MAGIC, 0)
        finally:
            os.close(fd)
        return cls(path)

    def holders(self) -> tuple[Holder, ...]:
        """All live holders."""
        with self._locked(fcntl.LOCK_SH) as fd:
            return self._live(fd)

    def glance(self) -> tuple[Holder, ...]:
        """All live holders, read without the lock, which a stopped process may hold. The bytes may be a moment old."""
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return self._live(fd)
        finally:
            os.close(fd)

    def _live(self, fd: int) -> tuple[Holder, ...]:
        rows = (row for _, row in self._rows(fd))
        return tuple(Holder(*row) for row in rows if process_alive(row[0], row[1]))

    def take(self, size_bytes: int, capacity_bytes: int, owner_pid: int) -> bool:
        """Charge `size_bytes` to this process. False, and nothing is charged, if that would exceed the capacity."""
        with self._locked(fcntl.LOCK_EX) as fd:
            others, mine, offset = self._survey(fd)
            if others + mine + size_bytes > capacity_bytes:
                return False
            self._write(fd, offset, owner_pid, mine + size_bytes)
            return True

    def give_back(self, size_bytes: int, owner_pid: int) -> None:
        """Return `size_bytes` that this process took."""
        with self._locked(fcntl.LOCK_EX) as fd:
            _, mine, offset = self._survey(fd)
            self._write(fd, offset, owner_pid, max(0, mine - size_bytes))

    def used_bytes(self) -> int:
        """Bytes held by all live holders together."""
        return sum(holder.held_bytes for holder in self.holders())

    def _survey(self, fd: int) -> tuple[int, int, int]:
        """Bytes that others hold, bytes that this process holds, and the offset of its row or of a free one."""
        me = (os.getpid(), started_at_s())
        others, mine, own, free = 0, 0, None, None
        for offset, (pid, started, _, held) in self._rows(fd):
            if (pid, started) == me:
                mine, own = held, offset
            elif process_alive(pid, started):
                others += held
            else:
                free = offset
        if own is None:
            own = os.fstat(fd).st_size if free is None else free
        return others, mine, own

    def _rows(self, fd: int) -> Iterator[tuple[int, tuple[int, float, int, int]]]:
        """Offset and content of every row."""
        table = os.pread(fd, os.fstat(fd).st_size, 0)
        if not table.startswith(_MAGIC):
            raise InvariantBroken(f"{self.path} is not the byte count of a virtual GPU; delete it and start again")
        for offset in range(len(_MAGIC), len(table) - _ROW.size + 1, _ROW.size):
            yield offset, _ROW.unpack_from(table, offset)

    @staticmethod
    def _write(fd: int, offset: int, owner_pid: int, held_bytes: int) -> None:
        os.pwrite(fd, _ROW.pack(os.getpid(), started_at_s() or 0.0, owner_pid, held_bytes), offset)

    @contextmanager
    def _locked(self, how: int) -> Iterator[int]:
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, how)
            yield fd
        finally:
            os.close(fd)
