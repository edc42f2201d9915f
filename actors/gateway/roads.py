"""The gateway's end of the tokens' road: connections to runners, and answers on them (`actors.road`).

A connection carries one answer at a time and is kept for the next one. An answer that nobody wants any more ends its
connection, and so the generation. What a client does not take is bounded: beyond `AHEAD_BYTES` nothing is read from
the runner, which then waits.
"""

from __future__ import annotations

import asyncio
import socket
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TypeVar

from actors.endpoint import Endpoint
from actors.frames import BrokenFrame, FrameReader, packed, pieces
from actors.gateway.shortcut import Shortcut
from actors.road import Kind, keep_alive
from scheduler.units import LeaseId, NodeId

AHEAD_BYTES = 65536  # of one answer; as much as a client's socket takes at once

CONNECT_S = 5.0
"""To a runner on another node. A machine that is away for so long is away."""

Frame = tuple[int, bytes]
Made = TypeVar("Made", bound=asyncio.Protocol)


async def connect(endpoint: Endpoint, node_id: NodeId, protocol: Callable[[], Made]) -> Made:
    """A connection from `node_id` to the endpoint. Raises OSError or asyncio.TimeoutError."""
    loop = asyncio.get_running_loop()
    if endpoint.node_id == node_id:
        connecting = socket.socket(socket.AF_UNIX)
        connecting.setblocking(False)
        try:
            connecting.connect(f"\0{endpoint.name}")
            _, made = await loop.create_unix_connection(protocol, sock=connecting)
        except BaseException:
            connecting.close()
            raise
        return made
    transport, made = await asyncio.wait_for(loop.create_connection(protocol, endpoint.host, endpoint.port), CONNECT_S)
    keep_alive(transport.get_extra_info("socket"))
    return made


class Road(asyncio.Protocol):
    """One connection to a runner. `forget(road)` is called when it is lost."""

    def __init__(self, forget: Callable[[Road], object]) -> None:
        self._forget = forget
        self.lost = False
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader()
        self._arrived: list[Frame] = []
        self._arrived_bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self._resumed: asyncio.Future[None] | None = None  # while the runner takes no more
        self.shortcut: Shortcut | None = None  # of the answer under way

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            frames = list(self._reader.frames(data))
        except BrokenFrame:
            self.close()
            return
        if self._take_shortcut(frames):
            return
        self._arrived += frames
        # Not what has come of a frame that is not whole: whoever waits for that frame would wait for ever.
        self._arrived_bytes += sum(len(payload) for _, payload in frames)
        if self._arrived_bytes > AHEAD_BYTES and self._transport is not None:
            self._transport.pause_reading()
        self._tell()

    def _take_shortcut(self, frames: Sequence[Frame]) -> bool:
        """Whether these frames are at the client: when whoever waits for them has passed on all that came before."""
        return (
            self.shortcut is not None
            and self._waiter is not None
            and not self._waiter.done()
            and bool(frames)
            and all(kind == Kind.EVENT for kind, _ in frames)
            and self.shortcut.take(b"".join(payload for _, payload in frames))
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._forget(self)
        self.resume_writing()
        self._tell()

    def _tell(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def ask(self, lease_proof: bytes, kind: int, payload: Sequence[bytes]) -> None:
        """Send a request under a proven lease. A large one goes in pieces, as fast as the runner takes them."""
        assert self._transport is not None
        proof = packed(Kind.PROOF, lease_proof)
        for piece in pieces(kind, payload):
            self._transport.write(b"".join([proof, piece]) if proof else piece)
            proof = b""
            if self._resumed is not None:
                await self._resumed
            if self.lost:
                return

    def pause_writing(self) -> None:
        self._resumed = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self._resumed is not None and not self._resumed.done():  # whoever waits may have been cancelled
            self._resumed.set_result(None)
        self._resumed = None

    async def frames(self) -> list[Frame]:
        """All that has arrived since, at least one. Raises ConnectionError when the runner has gone."""
        while not self._arrived:
            if self.lost:
                raise ConnectionError("the runner has gone")
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        arrived, self._arrived = self._arrived, []
        if self._arrived_bytes > AHEAD_BYTES and self._transport is not None:
            self._transport.resume_reading()
        self._arrived_bytes = 0
        return arrived

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class Roads:
    """All connections of a gateway on `node_id`. Belongs to one event loop."""

    def __init__(self, node_id: NodeId) -> None:
        self._node_id = node_id
        self._idle: dict[str, list[Road]] = defaultdict(list)  # by the name of the endpoint

    async def answer(
        self,
        endpoint: Endpoint,
        lease_id: LeaseId,
        kind: int,
        payload: Sequence[bytes],
        shortcut: Shortcut | None = None,
    ) -> AsyncGenerator[list[Frame], None]:
        """What the runner says to the request in `payload` (parts), frames that came together in one list. It ends with
        ENDED or FAILED. Events that take the shortcut are left out.

        Leaving it cancels the answer. Raises ConnectionError when the runner is gone, or goes.
        """
        road = await self._connection(endpoint)
        over = False
        road.shortcut = shortcut
        try:
            await road.ask(endpoint.proof(lease_id), kind, payload)
            while not over:
                arrived = await road.frames()
                over = arrived[-1][0] in (Kind.ENDED, Kind.FAILED)
                if over:
                    road.shortcut = None
                    self._idle[endpoint.name].append(road)
                yield arrived
        finally:
            if not over:
                road.close()

    def close(self) -> None:
        """Ends the connections that are not in use."""
        for road in [road for idle in self._idle.values() for road in idle]:
            road.close()

    async def _connection(self, endpoint: Endpoint) -> Road:
        if idle := self._idle.get(endpoint.name):
            return idle.pop()
        return await connect(endpoint, self._node_id, lambda: Road(lambda lost: self._forget(endpoint, lost)))

    def _forget(self, endpoint: Endpoint, lost: Road) -> None:
        idle = self._idle.get(endpoint.name, [])
        if lost in idle:
            idle.remove(lost)
        if not idle:
            self._idle.pop(endpoint.name, None)
