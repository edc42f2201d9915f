"""What people and monitors are told: the last few thousand notices, numbered, with a wake-up for those who follow."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from itertools import islice

from actors.records import Notice
from scheduler.commands import Announce

REMEMBERED = 5000
PAGE = 200  # notices in one reply
_ENDS = ("replica_died", "replica_evicted", "replica_preempted", "node_lost")


class NoticeBoard:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._notices: deque[Notice] = deque(maxlen=REMEMBERED)
        self._news = asyncio.Event()
        self.last_seq = 0

    def post(self, announce: Announce) -> None:
        self.last_seq += 1
        self._notices.append(
            Notice(
                seq=self.last_seq,
                at_s=time.time(),
                kind=announce.kind,
                message=announce.message,
                model=announce.model or None,
                replica_id=announce.replica_id or None,
                data=dict(announce.data),
            )
        )
        self._news.set()
        self._news = asyncio.Event()

    async def fate(self, replica_id: str, timeout_s: float) -> str:
        """What the newest notice says that tells of the replica's end; waits up to `timeout_s` seconds for one. Empty
        when there is none."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        while True:
            ends = (each for each in reversed(self._notices) if each.replica_id == replica_id and each.kind in _ENDS)
            if (notice := next(ends, None)) is not None:
                return notice.message
            try:
                await asyncio.wait_for(self._news.wait(), deadline_s - loop.time())
            except asyncio.TimeoutError:
                return ""

    def after(self, seq: int) -> list[Notice]:
        """The next notices after number `seq`, at most `PAGE`. A `seq` beyond the newest one comes from an earlier
        scheduler and counts as 0."""
        if seq > self.last_seq:
            seq = 0
        known = self.last_seq - len(self._notices)  # number of the last one that is forgotten
        start = max(0, seq - known)
        return list(islice(self._notices, start, start + PAGE))
