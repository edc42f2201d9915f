"""What the notice board tells of a replica's end."""

from __future__ import annotations

import asyncio

from actors.notices import NoticeBoard
from scheduler.commands import Announce


def test_the_fate_of_a_replica_is_waited_for() -> None:
    async def scenario() -> None:
        board = NoticeBoard()
        board.post(Announce("replica_ready", "tiny is ready", "tiny", "r1"))
        asking = asyncio.ensure_future(board.fate("r1", 30.0))
        await asyncio.sleep(0)
        board.post(Announce("replica_died", "another died", "other", "r2"))
        await asyncio.sleep(0)
        assert not asking.done()
        board.post(Announce("replica_died", "tiny died: SIGSEGV", "tiny", "r1"))
        assert await asking == "tiny died: SIGSEGV"
        assert await board.fate("r2", 0.0) == "another died"
        assert await board.fate("r3", 0.0) == ""

    asyncio.run(scenario())
