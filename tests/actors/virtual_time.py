"""An event loop whose clock jumps: whoever sleeps is woken at once, in order, and no second passes.

A test of time-outs takes milliseconds, and always goes the same way. What is given to a thread is done in the loop's
own, at once. A loop in which nothing is left to happen, or which has gone on for `LASTS_S` seconds, raises `Stuck`
instead of waiting for ever.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from math import inf
from typing import Any, TypeVar

Result = TypeVar("Result")

BEGINS_AT_S = 1000.0
LASTS_S = 3000.0


class Stuck(Exception):
    """What is waited for does not come."""


class _Clock(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = BEGINS_AT_S
        self.ends_at_s = BEGINS_AT_S + LASTS_S

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            if timeout is None or self.now_s > self.ends_at_s:
                raise Stuck
            self.now_s += max(0.0, timeout)
        return ready


class _AtOnce(ThreadPoolExecutor):
    """Calls in the caller's own thread: the clock must not jump while another one works."""

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        try:
            answer.set_result(call(*arguments, **named))
        except Exception as error:
            answer.set_exception(error)
        return answer


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _Clock()
        super().__init__(self._clock)
        self.set_default_executor(_AtOnce(max_workers=1))

    def time(self) -> float:
        return self._clock.now_s

    def go_on(self) -> None:
        """However long it takes."""
        self._clock.ends_at_s = inf


def play(scene: Coroutine[Any, Any, Result]) -> Result:
    """Run `scene` under a clock that jumps; what is still under way at its end is cancelled."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(scene)
    finally:
        loop.go_on()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
        loop.close()


def now_s() -> float:
    return asyncio.get_running_loop().time()
