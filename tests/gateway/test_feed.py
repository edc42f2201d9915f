"""Events are fetched once for all who follow them, in pages, and few may follow."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from gateway_fakes import FakeBackend

from actors.gateway import feed as module
from actors.gateway.errors import TooMuchHeld
from actors.gateway.feed import Feed
from actors.gateway.limits import MAX_FOLLOWERS, MAX_FOLLOWERS_OF_ONE
from actors.notices import PAGE, REMEMBERED, NoticeBoard
from actors.records import Notice
from scheduler.commands import Announce


class Board(FakeBackend):
    """A scheduler's real notice board. `asked`: after which notices it was asked for more."""

    def __init__(self) -> None:
        super().__init__()
        self.board = NoticeBoard()
        self.asked: list[int] = []

    def announce(self, count: int = 1) -> None:
        for _ in range(count):
            self.board.post(Announce("placed", "x"))

    async def notices(self, after_seq: int) -> AsyncIterator[Notice]:
        self.asked.append(after_seq)
        while news := self.board.after(after_seq):
            for notice in news:
                yield notice
                after_seq = notice.seq


async def numbers(feed: Feed, after: int = 0, source: str = "") -> list[int]:
    pages = [page async for page in feed.events(after, False, source)]
    return [int(number) for page in pages for number in re.findall(rb"^id: (\d+)$", page, re.MULTILINE)]


def played(scene: Callable[[Board, Feed], Coroutine[Any, Any, None]]) -> Board:
    board = Board()

    async def play() -> None:
        await scene(board, Feed(board))

    asyncio.run(play())
    return board


def test_everything_is_told_to_all_and_fetched_once() -> None:
    async def scene(board: Board, feed: Feed) -> None:
        board.announce(3 * PAGE)
        every = await asyncio.gather(*(numbers(feed, source=str(n)) for n in range(20)))
        assert all(each == list(range(1, 3 * PAGE + 1)) for each in every)
        assert await numbers(feed, after=3 * PAGE - 2) == [3 * PAGE - 1, 3 * PAGE]

    board = played(scene)
    assert board.asked.count(0) == 1 and set(board.asked) == {0, 3 * PAGE}


def test_what_was_announced_before_somebody_asks_is_told() -> None:
    async def scene(board: Board, feed: Feed) -> None:
        for count in range(1, 6):
            board.announce()
            asking = [asyncio.ensure_future(numbers(feed, source=str(n))) for n in range(3)]
            assert all(each == list(range(1, count + 1)) for each in await asyncio.gather(*asking))

    played(scene)


def test_no_more_is_kept_than_the_scheduler_remembers() -> None:
    async def scene(board: Board, feed: Feed) -> None:
        board.announce(REMEMBERED + 10)
        assert await numbers(feed) == list(range(11, REMEMBERED + 11))
        board.announce(5)
        assert await numbers(feed) == list(range(16, REMEMBERED + 16))

    played(scene)


def test_a_scheduler_that_was_restarted_counts_anew() -> None:
    async def scene(board: Board, feed: Feed) -> None:
        board.announce(9)
        assert await numbers(feed, after=7) == [8, 9]
        board.board = NoticeBoard()
        board.announce(2)
        assert await numbers(feed, after=9) == [1, 2]

    played(scene)


def test_followers_hear_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.01)

    async def scene(board: Board, feed: Feed) -> None:
        following = feed.events(0, True, "")
        board.announce()
        assert (await following.__anext__()).startswith(b"id: 1\n")
        more = asyncio.ensure_future(following.__anext__())
        await asyncio.sleep(0.02)
        board.announce()
        assert (await more).startswith(b"id: 2\n")
        await following.aclose()

    played(scene)


def test_few_may_follow() -> None:
    async def scene(board: Board, feed: Feed) -> None:
        board.announce()
        sources = [str(n // MAX_FOLLOWERS_OF_ONE) for n in range(MAX_FOLLOWERS)]
        following = [feed.events(0, True, source) for source in sources]
        for each in following:
            await each.__anext__()
        with pytest.raises(TooMuchHeld, match=r"64 clients follow the events, the maximum$"):
            await numbers(feed, source="new")
        await following.pop().aclose()
        with pytest.raises(TooMuchHeld, match="16 clients follow the events, the maximum for one key"):
            await numbers(feed, source="0")
        assert await numbers(feed, source="new") == [1]
        for each in following:
            await each.aclose()
        assert await numbers(feed, source="0") == [1]

    played(scene)
