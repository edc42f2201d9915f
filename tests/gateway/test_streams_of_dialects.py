"""Streams whose client is slow or gone, or whose model loads slowly, fails or is lost: on every route that streams."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest
from gateway_fakes import ANSWER, PATIENCE_S, FakeBackend, Gate, all_of, connect, head_of, running, serve, web
from spoken import ROUTES, Route

from actors.gateway import limits
from actors.gateway.app import make_app
from actors.gateway.dialects import OPENAI
from actors.serving.protocol import Chunk
from scheduler.errors import EngineFailed, Impossible

DIED = EngineFailed("the process that ran tiny ended")


@pytest.fixture(params=ROUTES.values(), ids=ROUTES.keys())
def route(request: pytest.FixtureRequest) -> Route:
    found: Route = request.param
    return found


@pytest.fixture
def impatient(backend: FakeBackend) -> Iterator[str]:
    """A gateway that comments on every hundredth second of silence."""
    with serve(backend, pulse_s=0.01) as url:
        yield url


def ask_and_keep(url: str, route: Route, *, stream: bool = True) -> socket.socket:
    """A connection on which `route` was asked and nothing is read."""
    data = json.dumps(route.body(stream=stream)).encode()
    connection = connect(url)
    connection.sendall(head_of(route.path, len(data)) + data)
    return connection


def test_an_answer_has_its_text_and_its_end(url: str, backend: FakeBackend, route: Route) -> None:
    reply = web.post(url + route.path, json=route.body())
    pieces = route.pieces(reply.text)
    assert route.text(pieces) == "Hello" and [route.is_end(piece) for piece in pieces[-2:]] == [False, True]
    media_type = reply.headers["content-type"].partition(";")[0]
    assert media_type == ("application/x-ndjson" if route.lines else "text/event-stream")


def test_silence_while_the_model_loads_is_bridged(impatient: str, backend: FakeBackend, route: Route) -> None:
    """By comments, where a client's parser knows some. To Ollama's nothing is said."""
    loading = Gate()
    backend.acquisitions.append(loading)
    with ask_and_keep(impatient, route) as connection:
        backend.wait_for("acquire")
        received = b""
        if route.lines:
            connection.settimeout(0.1)  # ten times the pulse
            with pytest.raises(TimeoutError):
                connection.recv(1)
            connection.settimeout(PATIENCE_S)
        while not route.lines and received.count(OPENAI.waiting) < 2:
            received += connection.recv(65536)
        loading.open()
        while not received.endswith(b"\r\n0\r\n\r\n"):
            received += connection.recv(65536)
    assert received.startswith(b"HTTP/1.1 200")
    pieces = route.pieces(unchunked(received))
    assert route.text(pieces) == "Hello" and route.is_end(pieces[-1])


def test_a_load_that_fails_late_is_told(impatient: str, backend: FakeBackend, route: Route) -> None:
    """In the stream, if it has begun; else as any refusal."""

    class FailingGate(Gate):
        async def passed(self) -> None:
            await super().passed()
            raise Impossible("needs 80 GiB, the cluster has 24 GiB")

    loading = FailingGate()
    backend.acquisitions.append(loading)
    with ask_and_keep(impatient, route) as connection:
        backend.wait_for("acquire")
        received = b"" if route.lines else connection.recv(65536)
        loading.open()
        while not received.endswith(b"}" if route.lines else b"\r\n0\r\n\r\n"):
            received += connection.recv(65536)
    if route.lines:
        head, _, body = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 422")
        told = route.told(json.loads(body))
    else:
        assert received.startswith(b"HTTP/1.1 200")
        told = route.error(route.pieces(unchunked(received)))
    kind = "invalid_request_error" if route.path == "/v1/messages" else route.kind("impossible")
    assert told == (kind, "needs 80 GiB, the cluster has 24 GiB")


def test_a_replica_that_dies_in_mid_stream_is_told_and_not_replaced(
    url: str, backend: FakeBackend, route: Route
) -> None:
    backend.answers.append([Chunk("Hel"), DIED])
    pieces = route.pieces(web.post(url + route.path, json=route.body()).text)
    assert route.text(pieces) == "Hel"
    assert route.error(pieces) == (route.kind("engine_failed"), DIED.message)
    assert len(backend.saw("generate")) == 1


def test_an_unforeseen_failure_in_mid_stream_is_told(
    url: str, backend: FakeBackend, route: Route, caplog: pytest.LogCaptureFixture
) -> None:
    class BrokenGate(Gate):
        async def passed(self) -> None:
            raise ZeroDivisionError("a bug")

    backend.answers.append([Chunk("Hel"), BrokenGate()])
    pieces = route.pieces(web.post(url + route.path, json=route.body()).text)
    kind, message = route.error(pieces)
    assert kind == route.kind("internal_error") and "ZeroDivisionError" in message
    assert "ZeroDivisionError" in caplog.text


def test_a_client_that_leaves_its_stream_stops_the_generation(url: str, backend: FakeBackend, route: Route) -> None:
    backend.answers.append([Chunk("Hel"), Gate()])
    with web.stream("POST", url + route.path, json=route.body()) as reply:
        assert next(reply.iter_lines())
    assert backend.wait_for("interrupted") == [("l1",)]
    ((lease, ending, _),) = backend.wait_for("release")
    assert (lease, ending) == ("l1", "left")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_that_leaves_the_queue_is_forgotten(
    url: str, backend: FakeBackend, route: Route, streaming: bool
) -> None:
    backend.acquisitions.append(Gate())
    connection = ask_and_keep(url, route, stream=streaming)
    ((need,),) = backend.wait_for("acquire")
    connection.close()
    assert backend.wait_for("cancel") == [(need.request_id,)]
    assert not backend.saw("release")


def test_a_client_that_stops_reading_loses_its_slot(
    url: str, backend: FakeBackend, route: Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "STALL_S", 0.05)
    backend.answers.append([*[Chunk("x" * 2**16)] * 400, Gate()])  # 26 MB: more than sockets hold
    with ask_and_keep(url, route):
        assert backend.wait_for("interrupted") == [("l1",)]


@pytest.mark.slow
def test_a_client_that_reads_slowly_gets_all(
    url: str, backend: FakeBackend, route: Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "STALL_S", 0.5)  # all of it takes longer
    backend.answers.append([*[Chunk("x" * 2**16)] * 200, *ANSWER])
    received = bytearray()
    with ask_and_keep(url, route) as connection:
        while not received.endswith(b"\r\n0\r\n\r\n"):
            received += connection.recv(2**18)
            time.sleep(0.01)
    pieces = route.pieces(unchunked(bytes(received)))
    assert route.text(pieces) == "x" * 200 * 2**16 + "Hello" and route.is_end(pieces[-1])


def test_an_open_stream_is_told_that_the_gateway_goes(backend: FakeBackend, route: Route) -> None:
    backend.answers.append([Chunk("Hel"), Gate()])
    with running(make_app(backend)) as (url, server), ask_and_keep(url, route) as connection:
        received = b""
        while b"Hel" not in received:
            received += connection.recv(65536)
        server.should_exit = True
        received += all_of(connection)
    assert received.endswith(b"\r\n0\r\n\r\n")  # the stream has ended, and was not cut
    assert route.error(route.pieces(unchunked(received))) == (route.kind("unavailable"), "Arriero is shutting down")
    assert backend.wait_for("interrupted") == [("l1",)]


@pytest.mark.slow
@pytest.mark.parametrize(("waiting", "streaming"), [("acquire", False), ("generate", True)])
def test_a_request_without_an_answer_yet_is_refused_when_the_gateway_goes(
    backend: FakeBackend, route: Route, streaming: bool, waiting: str
) -> None:
    if waiting == "acquire":
        backend.acquisitions.append(Gate())
    else:
        backend.answers.append([Gate()])
    with running(make_app(backend)) as (url, server), ask_and_keep(url, route, stream=streaming) as connection:
        backend.wait_for(waiting)
        server.should_exit = True
        head, _, said = all_of(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503") and b"retry-after: 5" in head.lower()
    assert route.told(json.loads(said)) == (route.kind("unavailable"), "Arriero is shutting down")
    if waiting == "acquire":
        assert len(backend.wait_for("cancel")) == 1


@pytest.mark.slow
def test_a_finished_stream_gets_nothing_more(backend: FakeBackend, route: Route) -> None:
    with running(make_app(backend)) as (url, server), ask_and_keep(url, route) as connection:
        received = b""
        while not received.endswith(b"\r\n0\r\n\r\n"):
            received += connection.recv(65536)
        server.should_exit = True
        assert all_of(connection) == b""
    assert route.is_end(route.pieces(unchunked(received))[-1])


def unchunked(received: bytes) -> str:
    """The body of an answer that was sent in chunks."""
    body, at = bytearray(), received.index(b"\r\n\r\n") + 4
    while at < len(received):
        begin = received.index(b"\r\n", at) + 2
        end = begin + int(received[at:begin], 16)
        body += received[begin:end]
        at = end + 2
    return body.decode()
