"""What happens to a request when its replica dies, its load is slow, or its client leaves."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from gateway_fakes import ANSWER, MODEL, FakeBackend, Gate, web

from actors.gateway.relay import REPLAYS, Relay
from actors.serving.protocol import Chunk, EmbedRequest, GenerateRequest, content_of
from scheduler.errors import ArrieroError, EngineFailed, Rejected
from scheduler.events import RequestArrived
from scheduler.units import RequestId

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
DIED = EngineFailed("the process that ran tiny ended")


def data_of(lines: Iterator[str]) -> list[Any]:
    return [json.loads(line[6:]) if line != "data: [DONE]" else "[DONE]" for line in lines if line.startswith("data: ")]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_replica_that_dies_before_its_first_token_is_replaced(
    url: str, backend: FakeBackend, streaming: bool
) -> None:
    backend.answers.extend([[DIED]] * REPLAYS)
    reply = web.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": streaming})
    assert reply.status_code == 200
    assert "Hel" in reply.text
    releases = backend.wait_for("release", REPLAYS + 1)
    assert [each[:2] for each in releases] == [("l1", "failed"), ("l2", "failed"), ("l3", "served")]


def test_replays_end(url: str, backend: FakeBackend) -> None:
    backend.answers.extend([[DIED]] * (REPLAYS + 1))
    reply = web.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True})
    assert reply.status_code == 502
    assert reply.json()["error"]["code"] == "engine_failed"
    assert [ending for _, ending, _ in backend.wait_for("release", REPLAYS + 1)] == ["failed"] * (REPLAYS + 1)


def test_an_answer_in_one_piece_is_made_again_whole(url: str, backend: FakeBackend) -> None:
    backend.answers.append([Chunk("Lost and "), DIED])
    reply = web.post(f"{url}/v1/chat/completions", json=CHAT)
    assert (reply.status_code, reply.json()["choices"][0]["message"]["content"]) == (200, "Hello")
    assert [ending for _, ending, _ in backend.wait_for("release", 2)] == ["failed", "served"]


def test_a_request_that_the_engine_refuses_is_not_replayed(url: str, backend: FakeBackend) -> None:
    backend.answers.append([Rejected("prompt is 5000 tokens; the slot holds 4096")])
    reply = web.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True})
    assert reply.status_code == 400
    assert [ending for _, ending, _ in backend.wait_for("release")] == ["served"]


def test_a_client_is_told_what_the_replica_ended_of(url: str, backend: FakeBackend) -> None:
    died = EngineFailed("the process that ran tiny ended", replica_id="r1")
    backend.fates["r1"] = "tiny died: GGML_ASSERT(buffer) failed"
    backend.answers.append([Chunk("Hel"), died])
    reply = web.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True})
    _, error = data_of(iter(reply.text.splitlines()))
    assert "GGML_ASSERT(buffer) failed" in error["error"]["message"]
    backend.answers.extend([[died]] * (REPLAYS + 1))
    whole = web.post(f"{url}/v1/chat/completions", json=CHAT).json()
    assert "GGML_ASSERT(buffer) failed" in whole["error"]["message"]


def test_an_answer_without_an_end_is_an_error(url: str, backend: FakeBackend) -> None:
    backend.answers.extend([[Chunk("Hel")]] * (REPLAYS + 1))
    reply = web.post(f"{url}/v1/chat/completions", json=CHAT)
    assert (reply.status_code, reply.json()["error"]["code"]) == (502, "engine_failed")


def test_embeddings_are_replayed(url: str, backend: FakeBackend) -> None:
    backend.embeddings.append(DIED)
    reply = web.post(f"{url}/v1/embeddings", json={"model": MODEL, "input": "x"})
    assert reply.status_code == 200
    assert [ending for _, ending, _ in backend.wait_for("release", 2)] == ["failed", "served"]
    backend.embeddings.extend([DIED] * (REPLAYS + 1))
    assert web.post(f"{url}/v1/embeddings", json={"model": MODEL, "input": "x"}).status_code == 502


@pytest.mark.parametrize("route", ["chat/completions", "embeddings"])
def test_a_client_that_leaves_without_a_stream_frees_its_slot(url: str, backend: FakeBackend, route: str) -> None:
    backend.answers.append([Gate()])
    backend.embeddings.append(Gate())
    connection = ask_and_keep(url, route, {**CHAT, "input": "x"})
    backend.wait_for("embed" if route == "embeddings" else "generate")
    connection.close()
    ((_, ending, _),) = backend.wait_for("release")
    assert ending == "left"


def test_a_client_that_leaves_an_order_to_load_is_forgotten(url: str, backend: FakeBackend) -> None:
    backend.acquisitions.append(Gate())
    connection = ask_and_keep(url, "load", {"model": MODEL}, api="api/v1")
    backend.wait_for("load")
    connection.close()
    ((cancelled,),) = backend.wait_for("cancel")
    assert cancelled.startswith("load-")


def ask_and_keep(url: str, route: str, body: dict[str, Any], api: str = "v1") -> socket.socket:
    """A connection on which `body` was asked and nothing is read."""
    address = httpx.URL(url)
    data = json.dumps(body).encode()
    connection = socket.create_connection((address.host, address.port))
    head = (
        f"POST /{api}/{route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    connection.sendall(head.encode() + data)
    return connection


# --- the relay by itself ---


def need() -> RequestArrived:
    return RequestArrived(RequestId("q1"), MODEL)


def test_leases_are_renewed_while_they_are_used() -> None:
    class Renewing(FakeBackend):
        async def renew(self, lease_ids: Any) -> None:
            await super().renew(lease_ids)
            if len(self.saw("renew")) == 3:
                done.open()

    async def scenario() -> None:
        relay = Relay(backend)
        async for _ in relay.generate(need(), GenerateRequest(content_of(prompt="x"))):
            pass
        relay.close()

    done = Gate()
    backend = Renewing(ttl_s=0.03)
    backend.answers.append([Chunk("a"), done, *ANSWER])
    asyncio.run(scenario())
    assert backend.saw("renew")[0] == (("l1",),)
    assert len(backend.saw("release")) == 1


def test_a_scheduler_that_is_away_does_not_spoil_the_answer() -> None:
    class Away(FakeBackend):
        async def release(self, *_: Any) -> None:
            raise ArrieroError("away")

        async def renew(self, lease_ids: Any) -> None:
            await super().renew(lease_ids)
            if len(self.saw("renew")) == 2:
                done.open()
            raise ArrieroError("away")

    async def scenario() -> bytes:
        relay = Relay(backend)
        answer = await relay.generate_whole(need(), GenerateRequest(content_of(prompt="x")))
        await relay.embed(need(), EmbedRequest(content_of(inputs=["x"])))
        relay.close()
        return answer

    done = Gate()
    backend = Away(ttl_s=0.03)
    backend.answers.append([done, *ANSWER])
    assert json.loads(asyncio.run(scenario()))["choices"][0]["text"] == "Hello"
