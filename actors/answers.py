"""Who waits for the core's word on a request: one future each, from before anything is waited for until the answer.

Invariant: a request that was cancelled is not with the core any more, whenever the cancel came. Belongs to one event
loop; `post` hands an event to the core.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from actors.leasing import Grant
from scheduler import events as ev
from scheduler.errors import ArrieroError, Unavailable
from scheduler.units import RequestId

Answer = Grant | ArrieroError
MOST_REMEMBERED = 1024
"""Cancelled requests that are remembered: Ray may deliver a cancel before its request, but not a thousand others."""


class Answers:
    """Requests reach the core once it is `settled`: deciding before it is known what is loaded would load it twice."""

    def __init__(self, post: Callable[[ev.Event], None]) -> None:
        self.settled = asyncio.Event()
        self._post = post
        self._waiting: dict[RequestId, asyncio.Future[Answer]] = {}
        self._cancelled: deque[RequestId] = deque(maxlen=MOST_REMEMBERED)

    def __len__(self) -> int:
        return len(self._waiting)

    async def ask(self, arrived: ev.RequestArrived) -> Answer:
        """The lease that is granted, or the error that the request is refused with. Asked twice under one id, the first
        is told so, for its caller has given up on it."""
        request_id = arrived.request_id
        if request_id in self._cancelled:
            return Unavailable("cancelled", retry_after_s=0.0)
        if self.give(request_id, Unavailable("asked again under the same request id", retry_after_s=0.0)):
            self._post(ev.RequestCancelled(request_id))
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = future  # from now on a cancel finds it
        try:
            await self.settled.wait()
            if not future.done():
                self._post(arrived)
            return await future
        except asyncio.CancelledError:
            if self._waiting.get(request_id) is future:
                del self._waiting[request_id]
            self._post(ev.RequestCancelled(request_id))  # also takes a lease back that was granted this moment
            raise

    def give(self, request_id: RequestId, answer: Answer) -> bool:
        """Answer whoever waits; False when nobody does any more."""
        future = self._waiting.pop(request_id, None)
        if future is None or future.done():
            return False
        future.set_result(answer)
        return True

    def cancel(self, request_id: RequestId) -> None:
        """Nobody wants the answer any more: the request leaves the queue, or its lease is given back. A request that
        comes after its cancel is not asked for."""
        self._cancelled.append(request_id)
        self.give(request_id, Unavailable("cancelled", retry_after_s=0.0))
        self._post(ev.RequestCancelled(request_id))

    def refuse_all(self, error: ArrieroError) -> None:
        for request_id in list(self._waiting):
            self.give(request_id, error)
