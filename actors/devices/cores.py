"""Who computes on a node's CPU: its cores are shared among the replicas that decode at this moment.

All runners of a node map one small file. It has a record per runner, which says whether the runner computes. Before
every decode a runner counts those that do, and takes its share of the cores. So an idle replica uses no core, and one
that wakes up has its share after one token of the others. There are no more threads than cores, unless more replicas
compute than there are cores. A process that died while it computed is noticed within `LOOK_EVERY_S`.
Cost: some microseconds per decode.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import struct
import time
from pathlib import Path

from actors.devices.processes import process_alive, this_process
from actors.devices.pulse import pids_of, private_folder, pulse_folder

LOOK_EVERY_S = 1.0

_RECORD = struct.Struct("<qdq")  # pid, started_at_s, computes: 1 or 0
_RECORDS = 64
_SIZE = _RECORD.size * _RECORDS
_COMPUTES = struct.Struct("<q")
_AT = _RECORD.size - _COMPUTES.size  # of the last field in its record

log = logging.getLogger(__name__)


class Cores:
    """A runner's share of its node's `n_cores`. Belongs to the thread that computes."""

    def __init__(self, memory: mmap.mmap | bytearray, mine: int, n_cores: int) -> None:
        self._memory, self._mine, self._n_cores = memory, mine, n_cores
        self._computes = False
        self._looked_at_s = 0.0
        self._dead: set[tuple[int, float]] = set()

    @classmethod
    def alone(cls, n_cores: int) -> Cores:
        """There is nobody to share with."""
        return cls(bytearray(_SIZE), 0, n_cores)

    @classmethod
    def on_node(cls, node_id: str, n_cores: int, *, folder: Path | None = None) -> Cores:
        """Shares the node's cores with other runners. If the file cannot be used, it takes all and logs a warning."""
        at = pulse_folder() if folder is None else folder
        try:
            private_folder(at)
            file = at / f"cores-{pids_of()}-{node_id}"
            fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                os.ftruncate(fd, _SIZE)
                memory = mmap.mmap(fd, _SIZE)
                return cls(memory, _claimed(memory), n_cores)
            finally:
                fcntl.flock(fd, fcntl.LOCK_UN)  # the mapping keeps the file open
                os.close(fd)
        except OSError as error:
            log.warning("this replica uses all %d cores, because it cannot share them: %s", n_cores, error)
            return cls.alone(n_cores)

    def share(self) -> int:
        """Threads for the decode that begins now."""
        if not self._computes:
            self._set(True)
        others = before = 0
        for index, (pid, started_at_s, computes) in enumerate(_RECORD.iter_unpack(self._memory)):
            if computes and index != self._mine and not self._is_dead(pid, started_at_s):
                others += 1
                before += index < self._mine
        each, left = divmod(self._n_cores, others + 1)
        return max(1, each + (before < left))

    def leave(self) -> None:
        """Give the cores back: there is nothing to compute."""
        if self._computes:
            self._set(False)

    def _set(self, computes: bool) -> None:
        self._computes = computes
        _COMPUTES.pack_into(self._memory, self._mine * _RECORD.size + _AT, computes)

    def _is_dead(self, pid: int, started_at_s: float) -> bool:
        now_s = time.monotonic()
        if now_s - self._looked_at_s > LOOK_EVERY_S:
            self._looked_at_s = now_s
            self._dead = {
                (other, since)
                for other, since, computes in _RECORD.iter_unpack(self._memory)
                if computes and not process_alive(other, since)
            }
        return (pid, started_at_s) in self._dead


def _claimed(memory: mmap.mmap) -> int:
    """The index of a record that is this process's from now on. Raises OSError when there is none."""
    process = this_process()
    for index, (pid, started_at_s, _) in enumerate(_RECORD.iter_unpack(memory)):
        if not pid or not process_alive(pid, started_at_s):
            _RECORD.pack_into(memory, index * _RECORD.size, *process.identity, 0)
            return index
    raise OSError(f"more than {_RECORDS} runners on one node")
