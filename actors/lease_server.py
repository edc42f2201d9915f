"""The scheduler's end of what gateways ask most: leases, over a socket of its own, several times as fast as over Ray.

    gateway                          scheduler
    PROOF                         -> (nothing; a wrong one ends the connection)
    ACQUIRE number, request       -> GRANTED number, grant, or REFUSED number, error; some time later
    RELEASE lease, ending, counts -> (nothing)
    CANCEL request id             -> (nothing)

Frames (`actors.frames`) with JSON. What comes on one connection takes effect in order: a cancel never overtakes its
request. A gateway that loses its connection asks again, under the same request ids.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from dataclasses import asdict
from enum import IntEnum
from typing import Any, Protocol

from actors.endpoint import LONGEST_PROOF_BYTES, Endpoint, listen
from actors.frames import BrokenFrame, FrameReader, packed
from actors.leasing import Grant, TokenCounts
from actors.road import keep_alive, packed_error, read_counts, read_error
from scheduler.cluster.leases import Ending
from scheduler.errors import ArrieroError, InvariantBroken
from scheduler.events import RequestArrived
from scheduler.units import LeaseId, NodeId, RequestId

LONGEST_BYTES = 65536  # of a frame: names and numbers
PROVED_WITHIN_S = 5.0  # from a connection's beginning; a gateway proves itself with its first bytes

GATEWAYS = LeaseId("gateways")
"""What a gateway proves: that it knows the scheduler's secret."""

log = logging.getLogger(__name__)


class Kind(IntEnum):
    PROOF = 1
    ACQUIRE = 2
    GRANTED = 3
    REFUSED = 4
    RELEASE = 5
    CANCEL = 6


class Office(Protocol):
    """What the scheduler actor does for a gateway. `acquire` returns its expected errors."""

    async def acquire(self, request: RequestArrived) -> Grant | ArrieroError: ...
    async def release(self, lease_id: LeaseId, ending: Ending, usage: TokenCounts) -> None: ...
    async def cancel(self, request_id: RequestId) -> None: ...


class LeaseServer:
    """Belongs to the scheduler's event loop. `start()` once; it lives as long as its process."""

    def __init__(self, office: Office, node_id: NodeId, host: str) -> None:
        self._office = office
        self._node_id, self._host = node_id, host
        self._servers: list[asyncio.Server] = []

    async def start(self) -> Endpoint:
        """Where it answers from now on."""
        loop = asyncio.get_running_loop()
        endpoint, (here, there) = listen(self._node_id, self._host)

        def connection() -> _Connection:
            return _Connection(self._office, endpoint)

        self._servers = [
            await loop.create_unix_server(connection, sock=here),
            await loop.create_server(connection, sock=there),
        ]
        return endpoint

    def close(self) -> None:
        for server in self._servers:
            server.close()


class _Connection(asyncio.Protocol):
    def __init__(self, office: Office, endpoint: Endpoint) -> None:
        self._office, self._endpoint = office, endpoint
        self._reader = FrameReader(LONGEST_PROOF_BYTES)
        self._proved = False
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        connected = transport.get_extra_info("socket")
        if connected.family != socket.AF_UNIX:
            keep_alive(connected)
        asyncio.get_running_loop().call_later(PROVED_WITHIN_S, self._end_stranger)

    def _end_stranger(self) -> None:
        if not self._proved:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            for kind, payload in self._reader.frames(data):
                self._take(kind, payload)
        except (BrokenFrame, ValueError, TypeError, KeyError) as error:
            if self._proved:  # strangers would fill the log
                log.warning("a connection is ended: %s", error)
            self._transport.abort()

    def _take(self, kind: int, payload: bytes) -> None:
        if kind == Kind.PROOF:
            self._proved = self._endpoint.proved(payload) == GATEWAYS
            self._reader.longest_bytes = LONGEST_BYTES if self._proved else LONGEST_PROOF_BYTES
        if not self._proved:
            raise BrokenFrame("it came without a proof")
        match kind:
            case Kind.ACQUIRE:
                number, fields = json.loads(payload)
                self._spawn(self._acquire(number, RequestArrived(*fields)))
            case Kind.RELEASE:
                lease_id, ending, counts = json.loads(payload)
                self._spawn(self._office.release(LeaseId(lease_id), ending, read_counts(counts.encode())))
            case Kind.CANCEL:
                self._spawn(self._office.cancel(RequestId(json.loads(payload))))
            case Kind.PROOF:
                pass
            case _:
                raise BrokenFrame(f"a frame of kind {kind}")

    async def _acquire(self, number: int, request: RequestArrived) -> None:
        answer: Grant | ArrieroError
        try:
            answer = await self._office.acquire(request)
        except Exception as error:  # nobody may wait for ever for an answer that does not come
            log.exception("a request for a lease failed")
            answer = InvariantBroken(f"the scheduler failed in acquire: {error}")
        if isinstance(answer, ArrieroError):
            self._transport.write(packed(Kind.REFUSED, json.dumps([number, packed_error(answer).decode()]).encode()))
        else:
            self._transport.write(packed(Kind.GRANTED, packed_grant(number, answer)))

    def _spawn(self, work: Any) -> None:
        """In order: tasks take their first step in the order in which they are made, and that step does it all."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def packed_grant(number: int, grant: Grant) -> bytes:
    """Payload of GRANTED."""
    fields = [getattr(grant, name) for name in _GRANT_FIELDS]
    where = None if grant.endpoint is None else asdict(grant.endpoint) | {"secret": grant.endpoint.secret.hex()}
    return json.dumps([number, fields, where]).encode()


def read_grant(payload: bytes) -> tuple[int, Grant]:
    number, fields, where = json.loads(payload)
    endpoint = None if where is None else Endpoint(**{**where, "secret": bytes.fromhex(where["secret"])})
    return number, Grant(**dict(zip(_GRANT_FIELDS, fields, strict=True)), endpoint=endpoint)


def read_refusal(payload: bytes) -> tuple[int, ArrieroError]:
    number, error = json.loads(payload)
    return number, read_error(error.encode())


_GRANT_FIELDS = ("lease_id", "replica_id", "model", "ttl_s", "n_ctx")
