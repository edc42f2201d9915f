"""The gateway's end of the scheduler's lease server (`actors.lease_server`): one connection for all requests."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import astuple

from actors.endpoint import Endpoint
from actors.frames import BrokenFrame, FrameReader, packed
from actors.gateway.roads import connect
from actors.lease_server import GATEWAYS, LONGEST_BYTES, Kind, read_grant, read_refusal
from actors.leasing import Grant, TokenCounts
from actors.road import packed_counts
from scheduler.cluster.leases import Ending
from scheduler.errors import ArrieroError
from scheduler.events import RequestArrived
from scheduler.units import LeaseId, NodeId, RequestId

MOST_UNTOLD = 10_000
"""Leases and requests that ended while the scheduler was away. Beyond that they expire."""

Waiting = dict[int, "asyncio.Future[Grant]"]


class LeaseClient:
    """`find` asks for the scheduler's endpoint, however long it takes. Belongs to one event loop."""

    def __init__(self, find: Callable[[], Awaitable[Endpoint]], node_id: NodeId) -> None:
        self._find = find
        self._node_id = node_id
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()
        self._numbers = itertools.count()
        self._untold: deque[bytes] = deque(maxlen=MOST_UNTOLD)

    async def acquire(self, request: RequestArrived) -> Grant:
        """The grant. Raises ArrieroError for a refusal, ConnectionError when the scheduler goes: ask again."""
        connection = await self._connected()
        number = next(self._numbers)
        answer: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        connection.waiting[number] = answer
        try:
            connection.write(packed(Kind.ACQUIRE, json.dumps([number, astuple(request)]).encode()))
            return await answer
        finally:
            connection.waiting.pop(number, None)

    def release(self, lease_id: LeaseId, ending: Ending, usage: TokenCounts) -> None:
        """One way. A scheduler that is away hears it when it is there again; else the lease expires."""
        self._tell(Kind.RELEASE, [lease_id, ending, packed_counts(usage).decode()])

    def cancel(self, request_id: RequestId) -> None:
        """One way, likewise."""
        self._tell(Kind.CANCEL, request_id)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def _tell(self, kind: Kind, what: object) -> None:
        told = packed(kind, json.dumps(what).encode())
        if self._connection is not None and not self._connection.lost:
            self._connection.write(told)
        else:
            self._untold.append(told)

    async def _connected(self) -> _Connection:
        if self._connection is not None and not self._connection.lost:
            return self._connection
        async with self._connecting:
            if self._connection is None or self._connection.lost:
                endpoint = await self._find()
                self._connection = await connect(endpoint, self._node_id, _Connection)
                self._connection.write(packed(Kind.PROOF, endpoint.proof(GATEWAYS)))
                while self._untold:
                    self._connection.write(self._untold.popleft())
            return self._connection


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.waiting: Waiting = {}
        self.lost = False
        self._reader = FrameReader(LONGEST_BYTES)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def write(self, frame: bytes) -> None:
        self._transport.write(frame)

    def close(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            for kind, payload in self._reader.frames(data):
                self._take(kind, payload)
        except BrokenFrame:
            self.close()

    def _take(self, kind: int, payload: bytes) -> None:
        answer: Grant | ArrieroError
        number, answer = read_grant(payload) if kind == Kind.GRANTED else read_refusal(payload)
        waiting = self.waiting.get(number)
        if waiting is None or waiting.done():  # whoever asked has left, and has said so
            return
        if isinstance(answer, ArrieroError):
            waiting.set_exception(answer)
        else:
            waiting.set_result(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        for waiting in self.waiting.values():
            if not waiting.done():
                with contextlib.suppress(asyncio.InvalidStateError):
                    waiting.set_exception(ConnectionError("the scheduler has gone"))
