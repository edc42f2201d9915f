"""A gateway that goes tells everybody: streams by a last event, all others by 503."""

from __future__ import annotations

import asyncio
import json

import pytest
from gateway_fakes import MODEL, FakeBackend, Gate, all_of, asked_in_process, connect, head_of, running

from actors.gateway.app import make_app
from actors.serving.protocol import Chunk

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


def test_an_open_stream_gets_a_last_event(backend: FakeBackend) -> None:
    backend.answers.append([Chunk("Hel"), Gate()])
    body = json.dumps({**CHAT, "stream": True}).encode()
    with running(make_app(backend)) as (url, server), connect(url) as connection:
        connection.sendall(head_of("/v1/chat/completions", len(body)) + body)
        received = b""
        while b"Hel" not in received:
            received += connection.recv(65536)
        server.should_exit = True
        received += all_of(connection)
    *_, event = [line for line in received.decode().splitlines() if line.startswith("data: ")]
    error = json.loads(event[6:])["error"]
    assert (error["code"], error["message"]) == ("unavailable", "Arriero is shutting down")
    assert received.endswith(b"\r\n0\r\n\r\n")  # the stream has ended, and was not cut
    assert backend.wait_for("interrupted") == [("l1",)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("waiting", ["acquire", "generate"])
def test_a_request_without_an_answer_yet_is_refused(backend: FakeBackend, streaming: bool, waiting: str) -> None:
    if waiting == "acquire":
        backend.acquisitions.append(Gate())
    else:
        backend.answers.append([Gate()])
    body = json.dumps({**CHAT, "stream": streaming}).encode()
    with running(make_app(backend)) as (url, server), connect(url) as connection:
        connection.sendall(head_of("/v1/chat/completions", len(body)) + body)
        backend.wait_for(waiting)
        server.should_exit = True
        head, _, said = all_of(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503") and b"retry-after: 5" in head.lower()
    assert json.loads(said)["error"]["message"] == "Arriero is shutting down"
    if waiting == "acquire":
        assert len(backend.wait_for("cancel")) == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/v1/load", "/health", "/nothing"])
def test_a_new_request_is_refused(path: str) -> None:
    app = make_app(FakeBackend())
    app.state.closing.begin()
    status, said = asyncio.run(asked_in_process(app, path, json.dumps(CHAT).encode()))
    assert (status, json.loads(said)["error"]["code"]) == (503, "unavailable")


def test_a_finished_stream_gets_nothing_more(backend: FakeBackend) -> None:
    body = json.dumps({**CHAT, "stream": True}).encode()
    with running(make_app(backend)) as (url, server), connect(url) as connection:
        connection.sendall(head_of("/v1/chat/completions", len(body)) + body)
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += connection.recv(65536)
        server.should_exit = True
        assert all_of(connection) == b""
    assert b"[DONE]" in received and b"error" not in received
