"""Leases over the scheduler's own socket: a real server and client, and an office that is scripted."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from actors.endpoint import Endpoint
from actors.frames import packed
from actors.gateway.lease_client import LeaseClient
from actors.lease_server import GATEWAYS, Kind, LeaseServer, packed_grant, read_grant
from actors.leasing import Grant, TokenCounts
from scheduler.cluster.leases import Ending
from scheduler.costs.paces import Pace
from scheduler.errors import (
    ArrieroError,
    DeadlineExceeded,
    Impossible,
    InvariantBroken,
    QueueFull,
    Rejected,
    Unavailable,
    UnknownModel,
)
from scheduler.events import RequestArrived
from scheduler.units import LeaseId, NodeId, ReplicaId, RequestId

HERE = NodeId("here")
ENDPOINT = Endpoint(HERE, "socket", "127.0.0.1", 7, b"\x00\xff")
REFUSALS: dict[str, ArrieroError] = {
    kind.__name__: kind(f"no: {kind.__name__}", retry_after_s=2.5)
    for kind in (Rejected, UnknownModel, Impossible, Unavailable, QueueFull, DeadlineExceeded)
}


class ScriptedOffice:
    """Grants every model but "queued", which waits, and those that are named as an error."""

    def __init__(self) -> None:
        self.journal: list[Any] = []
        self.changed = asyncio.Event()

    def note(self, *entry: Any) -> None:
        self.journal.append(entry)
        self.changed.set()

    async def wait_for(self, entry: Any) -> None:
        while entry not in self.journal:
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 20)

    async def acquire(self, request: RequestArrived) -> Grant | ArrieroError:
        self.note("acquire", request)
        if request.model == "queued":
            await asyncio.Event().wait()
        if request.model == "bug":
            raise ZeroDivisionError("a bug")
        if request.model in REFUSALS:
            return REFUSALS[request.model]
        return Grant(LeaseId(f"of {request.request_id}"), ReplicaId("r"), ENDPOINT, request.model, 60.0, 4096)

    async def release(self, lease_id: LeaseId, ending: Ending, usage: TokenCounts) -> None:
        self.note("release", lease_id, ending, usage)

    async def cancel(self, request_id: RequestId) -> None:
        self.note("cancel", request_id)


def perform(
    scene: Callable[[LeaseClient, ScriptedOffice, Endpoint], Awaitable[None]], node_id: NodeId = HERE
) -> ScriptedOffice:
    async def whole() -> ScriptedOffice:
        office = ScriptedOffice()
        server = LeaseServer(office, HERE, "127.0.0.1")
        endpoint = await server.start()

        async def find() -> Endpoint:
            return endpoint

        client = LeaseClient(find, node_id)
        try:
            await scene(client, office, endpoint)
        finally:
            client.close()
            server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0.01)
        return office

    return asyncio.run(whole())


def asked(name: str, model: str = "m") -> RequestArrived:
    return RequestArrived(RequestId(name), model, "embed", 512, 1.5, -3, "ann", "prefix", "fingerprint")


@pytest.mark.parametrize("node_id", [HERE, NodeId("there")], ids=["on its node", "over TCP"])
def test_grants_and_refusals_come_back_as_they_are(node_id: NodeId) -> None:
    async def scene(client: LeaseClient, office: ScriptedOffice, _: Endpoint) -> None:
        requests = [asked(f"q{number}") for number in range(50)]
        grants = await asyncio.gather(*map(client.acquire, requests))
        assert [grant.lease_id for grant in grants] == [f"of q{number}" for number in range(50)]
        assert grants[0] == Grant(LeaseId("of q0"), ReplicaId("r"), ENDPOINT, "m", 60.0, 4096)
        assert [request for what, request in office.journal if what == "acquire"] == requests
        for name, error in REFUSALS.items():
            with pytest.raises(type(error), match=f"no: {name}") as caught:
                await client.acquire(asked("x", name))
            assert caught.value.details == {"retry_after_s": 2.5}
        with pytest.raises(InvariantBroken, match="a bug"):
            await client.acquire(asked("x", "bug"))
        usage = TokenCounts(1, 2, 3, Pace(1, 0.5, 2, 0.25, 9))
        client.release(LeaseId("l"), "failed", usage)
        await office.wait_for(("release", "l", "failed", usage))

    perform(scene, node_id)


def test_what_ends_while_the_scheduler_is_away_is_told_when_it_is_back() -> None:
    async def scene(client: LeaseClient, office: ScriptedOffice, _: Endpoint) -> None:
        client.release(LeaseId("l"), "left", TokenCounts())
        client.cancel(RequestId("q"))
        await client.acquire(asked("first"))
        await office.wait_for(("cancel", "q"))
        assert [what for what, *_ in office.journal] == ["release", "cancel", "acquire"]

    perform(scene)


def test_a_cancel_comes_after_its_request() -> None:
    async def scene(client: LeaseClient, office: ScriptedOffice, _: Endpoint) -> None:
        await client.acquire(asked("first"))  # it is connected
        for number in range(100):
            asking = asyncio.ensure_future(client.acquire(asked(f"q{number}", "queued")))
            await asyncio.sleep(0)
            asking.cancel()
            client.cancel(RequestId(f"q{number}"))
            await asyncio.wait([asking])
        await office.wait_for(("cancel", "q99"))

    journal = [what for what, *_ in perform(scene).journal[1:]]
    assert journal == ["acquire", "cancel"] * 100


def test_a_scheduler_that_goes_is_asked_again_where_it_is_then() -> None:
    async def scene(client: LeaseClient, office: ScriptedOffice, endpoint: Endpoint) -> None:
        waiting = asyncio.ensure_future(client.acquire(asked("q", "queued")))
        await office.wait_for(("acquire", asked("q", "queued")))
        client.close()  # as its end would
        with pytest.raises(ConnectionError, match="has gone"):
            await waiting
        client.cancel(RequestId("q"))  # nobody hears it, and nothing breaks
        assert (await client.acquire(asked("again"))).lease_id == "of again"

    perform(scene)


def test_nobody_asks_without_the_secret() -> None:
    async def scene(client: LeaseClient, office: ScriptedOffice, endpoint: Endpoint) -> None:
        acquire = packed(Kind.ACQUIRE, b'[1, ["q", "m"]]')
        liar = Endpoint(HERE, endpoint.name, endpoint.host, endpoint.port, b"guessed")
        too_long = struct.pack("<IB", 65_000, Kind.PROOF)  # of somebody who has proved nothing
        garbage = [random.Random(seed).randbytes(300) for seed in range(20)]
        proof = packed(Kind.PROOF, endpoint.proof(GATEWAYS))
        for sent in (
            acquire,
            packed(Kind.PROOF, liar.proof(GATEWAYS)) + acquire,
            packed(Kind.PROOF, endpoint.proof(LeaseId("another"))) + acquire,
            too_long,
            proof + packed(Kind.ACQUIRE, b"no JSON"),
            proof + packed(99),
            *garbage,
            *(proof + each for each in garbage),
        ):
            reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
            writer.write(sent)
            if sent is not too_long:
                writer.write_eof()
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()
        assert office.journal == []
        assert (await client.acquire(asked("still"))).lease_id == "of still"

    perform(scene)


def test_silent_strangers_are_shown_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.lease_server.PROVED_WITHIN_S", 0.05)

    async def scene(client: LeaseClient, office: ScriptedOffice, endpoint: Endpoint) -> None:
        with socket.socket(socket.AF_UNIX) as silent:
            silent.setblocking(False)
            silent.connect(f"\0{endpoint.name}")
            assert await asyncio.get_running_loop().sock_recv(silent, 1) == b""
        await client.acquire(asked("quick"))
        await asyncio.sleep(0.1)
        assert (await client.acquire(asked("later"))).lease_id == "of later"

    perform(scene)


def test_a_grant_without_a_runner_stays_one() -> None:
    grant = Grant(LeaseId("l"), ReplicaId("r"), None, "m", 60.0, 4096)
    assert read_grant(packed_grant(7, grant)) == (7, grant)
