"""What happens to a request when its replica dies, its load is slow, or its client leaves."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from gateway_fakes import ANSWER, MODEL, FakeBackend, Gate, serve, web

from actors.gateway import limits
from actors.gateway.dialects import OPENAI
from actors.gateway.relay import REPLAYS, Relay
from actors.serving.protocol import Chunk, EmbedRequest, GenerateRequest, content_of
from scheduler.errors import ArrieroError, EngineFailed, Impossible, Rejected
from scheduler.events import RequestArrived
from scheduler.units import RequestId

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
DIED = EngineFailed("the process that ran tiny ended")


@pytest.fixture
def impatient(backend: FakeBackend) -> Iterator[str]:
    """A gateway that comments on every hundredth second of silence."""
    with serve(backend, pulse_s=0.01) as url:
        yield url


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


def test_a_stream_that_has_begun_is_not_replayed(url: str, backend: FakeBackend) -> None:
    backend.answers.append([Chunk("Hel"), DIED])
    reply = web.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True})
    first, error = data_of(iter(reply.text.splitlines()))
    assert first["choices"][0]["delta"]["content"] == "Hel"
    assert error["error"]["message"] == DIED.message
    assert len(backend.saw("generate")) == 1


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


def test_a_waiting_stream_is_kept_alive(impatient: str, backend: FakeBackend) -> None:
    loading = Gate()
    backend.acquisitions.append(loading)
    with web.stream("POST", f"{impatient}/v1/chat/completions", json={**CHAT, "stream": True}) as reply:
        lines = reply.iter_lines()
        assert (reply.status_code, reply.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert next(lines) == OPENAI.waiting.decode().strip()
        loading.open()
        events = data_of(lines)
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1]) == "Hello"
    assert events[-1] == "[DONE]"


def test_a_load_that_fails_late_is_an_event(impatient: str, backend: FakeBackend) -> None:
    class FailingGate(Gate):
        async def passed(self) -> None:
            await super().passed()
            raise Impossible("needs 80 GiB, the cluster has 24 GiB")

    loading = FailingGate()
    backend.acquisitions.append(loading)
    with web.stream("POST", f"{impatient}/v1/chat/completions", json={**CHAT, "stream": True}) as reply:
        lines = reply.iter_lines()
        next(lines)
        loading.open()
        (event,) = data_of(lines)
    assert event["error"]["code"] == "impossible"


def test_a_client_that_leaves_its_stream_stops_the_generation(url: str, backend: FakeBackend) -> None:
    backend.answers.append([Chunk("Hel"), Gate()])
    with web.stream("POST", f"{url}/v1/chat/completions", json={**CHAT, "stream": True}) as reply:
        assert next(reply.iter_lines()).startswith("data: ")
    assert backend.wait_for("interrupted") == [("l1",)]
    ((lease, ending, _),) = backend.wait_for("release")
    assert (lease, ending) == ("l1", "left")


@pytest.mark.parametrize("route", ["chat/completions", "embeddings"])
def test_a_client_that_leaves_without_a_stream_frees_its_slot(url: str, backend: FakeBackend, route: str) -> None:
    backend.answers.append([Gate()])
    backend.embeddings.append(Gate())
    connection = ask_and_keep(url, route, {**CHAT, "input": "x"})
    backend.wait_for("embed" if route == "embeddings" else "generate")
    connection.close()
    ((_, ending, _),) = backend.wait_for("release")
    assert ending == "left"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_that_leaves_the_queue_is_forgotten(url: str, backend: FakeBackend, streaming: bool) -> None:
    backend.acquisitions.append(Gate())
    connection = ask_and_keep(url, "chat/completions", {**CHAT, "stream": streaming})
    ((need,),) = backend.wait_for("acquire")
    connection.close()
    assert backend.wait_for("cancel") == [(need.request_id,)]
    assert not backend.saw("release")


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


def test_an_unforeseen_failure_in_mid_stream_is_told(
    impatient: str, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    class BrokenGate(Gate):
        async def passed(self) -> None:
            raise ZeroDivisionError("a bug")

    backend.answers.append([Chunk("Hel"), BrokenGate()])
    reply = web.post(f"{impatient}/v1/chat/completions", json={**CHAT, "stream": True})
    assert data_of(iter(reply.text.splitlines()))[-1]["error"]["code"] == "internal_error"
    assert "ZeroDivisionError" in caplog.text


def test_a_client_that_stops_reading_loses_its_slot(
    url: str, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "STALL_S", 0.05)
    backend.answers.append([*[Chunk("x" * 2**16)] * 400, Gate()])  # 26 MB: more than sockets hold
    with ask_and_keep(url, "chat/completions", {**CHAT, "stream": True}):
        assert backend.wait_for("interrupted") == [("l1",)]


def test_a_client_that_reads_slowly_gets_all(url: str, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STALL_S", 0.3)
    backend.answers.append([*[Chunk("x" * 2**16)] * 200, *ANSWER])
    received = bytearray()
    with ask_and_keep(url, "chat/completions", {**CHAT, "stream": True}) as connection:
        while b"[DONE]" not in received[-100:]:
            received += connection.recv(2**18)
            time.sleep(0.005)
    assert received.count(b"x" * 2**16) == 200


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
