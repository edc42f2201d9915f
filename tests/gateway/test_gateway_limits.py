"""What clients may hold: connections that say nothing or too slowly, too many of them, too much in all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from gateway_fakes import MODEL, FakeBackend, Gate, all_of, connect, head_of, running, serve, web

from actors.gateway import limits
from actors.gateway.app import make_app
from actors.gateway.errors import BodyTooLarge, TooMuchHeld
from actors.gateway.limits import INLINE_BYTES, MAX_BODY_BYTES, Held

BODY = json.dumps({"model": MODEL, "prompt": "Hi"}).encode()
COMPLETIONS = "/v1/completions"


def refusal(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def test_headers_that_come_slowly(url: str, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEAD_S", 0.1)
    with connect(url) as connection:
        connection.sendall(head_of(COMPLETIONS, 5)[:-10])
        assert refusal(all_of(connection)) == (408, "request_timeout")


@pytest.mark.parametrize("sent", [b"", BODY[:-1]])
def test_a_body_that_comes_slowly(url: str, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(limits, "BODY_S", 0.1)
    with connect(url) as connection:
        connection.sendall(head_of(COMPLETIONS, len(BODY)) + sent)
        assert refusal(all_of(connection)) == (408, "request_timeout")
    assert not backend.journal


def test_every_byte_does_not_begin_the_time_anew(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEAD_S", 0.3)
    connection = connect(url)
    connection.settimeout(0.02)
    received = b""
    with connection:
        for byte in head_of(COMPLETIONS, 5) * 100:  # 300 seconds of it
            try:
                connection.sendall(bytes([byte]))
                received = connection.recv(65536)
                break
            except TimeoutError:
                pass
        assert refusal(received) == (408, "request_timeout")


def test_a_connection_that_says_nothing_is_closed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "KEEP_ALIVE_S", 0.1)
    with connect(url) as connection:
        assert all_of(connection) == b""


def test_an_answer_may_take_longer_than_its_request(
    url: str, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HEAD_S", "BODY_S", "KEEP_ALIVE_S"):
        monkeypatch.setattr(limits, name, 0.5)
    gate = Gate()
    backend.acquisitions.append(gate)
    with connect(url) as connection:
        connection.sendall(head_of(COMPLETIONS, len(BODY)) + BODY)
        backend.wait_for("acquire")
        connection.settimeout(1.0)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        gate.open()
        connection.settimeout(20.0)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(
    "what", [b"\x16\x03\x01 no HTTP\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a:\r\n" * 60_000]
)
def test_what_is_no_http_is_refused_in_our_shape(url: str, what: bytes) -> None:
    with connect(url) as connection:
        connection.sendall(what)
        assert refusal(connection.recv(65536)) == (400, "invalid_request")


@pytest.fixture
def crowded(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A gateway that takes two connections from an address."""
    monkeypatch.setattr(limits, "connection_limit_of_address", lambda: 2)
    with serve(backend) as url:
        yield url


def get(connection: Any) -> bytes:
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = b""
    while b"}" not in answer:  # the body is the end of it
        answer += connection.recv(65536)
    return answer


def test_an_address_has_so_many_connections(crowded: str) -> None:
    with connect(crowded) as one, connect(crowded) as two, connect(crowded) as three:
        assert get(one).startswith(b"HTTP/1.1 200") and get(two).startswith(b"HTTP/1.1 200")
        answer = get(three)
        assert refusal(answer) == (429, "too_much_held") and b"retry-after: 5" in answer.lower()
        two.close()
        until_answered(crowded)
        assert get(one).startswith(b"HTTP/1.1 200")  # who is in stays in


def test_there_are_so_many_connections_in_all(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "connection_limit", lambda: 1)
    monkeypatch.setattr(limits, "connection_limit_of_address", lambda: 9)
    with serve(backend) as url, connect(url) as one, connect(url) as two:
        assert get(one).startswith(b"HTTP/1.1 200")
        assert refusal(get(two)) == (429, "too_much_held")


def until_answered(url: str) -> None:
    """Until the server has noticed that a connection is gone; the test's own time-out is the limit."""
    while web.get(f"{url}/health", headers={"Connection": "close"}).status_code != 200:
        pass


def test_large_requests_together_are_bounded_until_they_are_answered(backend: FakeBackend) -> None:
    large = {"model": MODEL, "prompt": "x" * 3 * INLINE_BYTES}
    gate = Gate()
    backend.acquisitions.append(gate)
    with running(make_app(backend, max_held_bytes=3 * INLINE_BYTES)) as (url, _):
        body = json.dumps(large).encode()
        with connect(url) as connection:
            connection.sendall(head_of(COMPLETIONS, len(body)) + body)
            backend.wait_for("acquire")
            reply = web.post(url + COMPLETIONS, json=large)
            assert (reply.status_code, reply.json()["error"]["code"]) == (429, "too_much_held")
            assert reply.headers["retry-after"] == "5"
            assert web.post(url + COMPLETIONS, json={"model": MODEL, "prompt": "small"}).status_code == 200
            gate.open()
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        assert web.post(url + COMPLETIONS, json=large).status_code == 200


def test_what_is_held_is_counted_to_the_byte() -> None:
    held = Held(limit_bytes=1000)
    with held.request(MAX_BODY_BYTES) as one:
        for piece in (INLINE_BYTES - 1, 2, 600):
            one.add(piece)
        assert held.held_bytes == 601
        with held.request(MAX_BODY_BYTES) as two:
            two.add(INLINE_BYTES + 399)
            assert held.held_bytes == 1000
            with pytest.raises(TooMuchHeld):
                two.add(1)
        assert held.held_bytes == 601
        with held.request(10) as small, pytest.raises(BodyTooLarge):
            small.add(11)
    assert held.held_bytes == 0


def test_connections_leave_open_files_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (1024, 4096))
    assert (limits.connection_limit(), limits.connection_limit_of_address()) == (768, 384)
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (limits.resource.RLIM_INFINITY,) * 2)
    assert limits.connection_limit() == limits.MAX_CONNECTIONS
