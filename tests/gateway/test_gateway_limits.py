"""What clients may hold: connections that say nothing or too slowly, too many of them, too much in all."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from gateway_fakes import MODEL, FakeBackend, Gate, all_of, connect, head_of, running, serve, web
from uvicorn.protocols.http.h11_impl import H11Protocol

from actors.gateway import limits
from actors.gateway.app import make_app
from actors.gateway.errors import BodyTooLarge, TooMuchHeld
from actors.gateway.limits import INLINE_BYTES, MAX_BODY_BYTES, Held
from actors.gateway.turns import Turns

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


@pytest.mark.slow
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


IN_CHUNKS = (
    f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    "Transfer-Encoding: chunked\r\n{}\r\n"
).encode()


def chunks(body: bytes, size: int) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        IN_CHUNKS.replace(b"{}", b"") + chunks(BODY + b" " * 5000, 1),
        IN_CHUNKS.replace(b"{}", b"") + b"0\r\n" + b"a:\r\n" * 3000,
    ],
    ids=["chunks", "trailers"],
)
@pytest.mark.parametrize("step", [1 << 20, 1000, 60])
def test_bodies_in_tiny_pieces_are_refused_before_they_are_read(
    sent: bytes, step: int, url: str, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0
    receive = H11Protocol.data_received

    def counting(connection: Any, data: bytes) -> None:
        nonlocal read
        read += data.count(b"\n")
        receive(connection, data)

    monkeypatch.setattr(H11Protocol, "data_received", counting)
    with connect(url) as connection:
        with contextlib.suppress(OSError):  # it closes before all of it is sent
            for at in range(0, len(sent), step):
                connection.sendall(sent[at : at + step])
        with contextlib.suppress(ConnectionResetError):
            answer = connection.recv(65536)
            assert refusal(answer) == (400, "invalid_request") and b"too small" in answer
    assert read <= limits.FREE_LINES
    assert not backend.saw("acquire")


@pytest.mark.slow
def test_bodies_in_chunks_of_some_size_are_welcome(url: str, backend: FakeBackend) -> None:
    long = BODY[:-1] + b', "user": "%s"}' % (b"x" * 100_000)
    for body, size in ((BODY, 10), (long, 600)):
        with connect(url) as connection:
            connection.sendall(IN_CHUNKS.replace(b"{}", b"") + chunks(body, size))
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")


def test_a_refused_client_may_not_go_on_in_tiny_pieces(backend: FakeBackend) -> None:
    with serve(backend, {"ann": "secret"}) as url, connect(url) as connection:
        connection.sendall(IN_CHUNKS.replace(b"{}", b""))
        assert connection.recv(65536).startswith(b"HTTP/1.1 401")
        with contextlib.suppress(OSError):
            for _ in range(2000):
                connection.sendall(b"1\r\n \r\n" * 100)
                time.sleep(0.01)  # what is sent before the end of the connection is known is taken by the system
            pytest.fail("it was let go on")
    assert not backend.journal


@pytest.fixture
def crowded(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A gateway that takes two connections from an address."""
    monkeypatch.setattr(limits, "connection_limit_of_address", lambda: 2)
    with serve(backend) as url:
        yield url


def get(connection: Any, headers: bytes = b"") -> bytes:
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\n")
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


def from_address(url: str, address: str) -> socket.socket:
    """A connection from another address of loopback, which stands for another machine."""
    target = httpx.URL(url)
    return socket.create_connection((target.host, target.port or 0), 20.0, source_address=(address, 0))


def test_who_has_most_connections_gives_way(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "connection_limit", lambda: 3)
    monkeypatch.setattr(limits, "connection_limit_of_address", lambda: 2)
    gate = Gate()
    backend.acquisitions.append(gate)
    with (
        serve(backend) as url, from_address(url, "127.0.0.2") as busy, from_address(url, "127.0.0.2") as idle,
        from_address(url, "127.0.0.3") as other,
    ):  # fmt: skip
        busy.sendall(head_of(COMPLETIONS, len(BODY)) + BODY)
        backend.wait_for("acquire")
        assert get(other).startswith(b"HTTP/1.1 200")
        with from_address(url, "127.0.0.4") as newcomer:
            assert get(newcomer).startswith(b"HTTP/1.1 200")
            assert all_of(idle) == b"", "it waits for nothing, and its address has most"
            with from_address(url, "127.0.0.5") as last:
                assert refusal(get(last)) == (429, "too_much_held"), "whoever is answered stays"
        gate.open()
        assert busy.recv(65536).startswith(b"HTTP/1.1 200")


def test_who_is_refused_and_keeps_its_body_back_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it waits for an answer any more."""
    monkeypatch.setattr(limits, "connection_limit", lambda: 2)
    monkeypatch.setattr(limits, "connection_limit_of_address", lambda: 9)
    with (
        serve(FakeBackend(), {"ann": "secret"}) as url, from_address(url, "127.0.0.2") as one,
        from_address(url, "127.0.0.2") as other,
    ):  # fmt: skip
        for each in (one, other):
            each.sendall(head_of(COMPLETIONS, 1000))
            assert each.recv(65536).startswith(b"HTTP/1.1 401")
        with from_address(url, "127.0.0.3") as newcomer:
            assert get(newcomer).startswith(b"HTTP/1.1 200")


def test_who_is_refused_may_send_the_rest_and_go_on(url: str) -> None:
    """Clients that send a head and then a body use the connection again."""
    with connect(url) as connection:
        connection.sendall(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n")
        answer = b""
        while b"no_such_route" not in answer:
            answer += connection.recv(65536)
        connection.sendall(b"rest")
        assert get(connection).startswith(b"HTTP/1.1 200")


def test_many_headers_or_parameters_are_refused_before_they_are_read(url: str) -> None:
    many = b"a:b\r\n" * (limits.MAX_HEAD_LINES + 1)
    with connect(url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + many)
        assert refusal(all_of(connection)) == (400, "invalid_request")
    with connect(url) as connection:  # those of one request after the other are not added up
        for _ in range(5):
            assert get(connection, b"a:b\r\n" * 60).startswith(b"HTTP/1.1 200")
    assert web.get(f"{url}/health?{'&'.join('abcdefghij' * 6)}").status_code == 200
    reply = web.get(f"{url}/health?{'&'.join('a' * (limits.MAX_QUERY_PARTS + 1))}")
    assert reply.status_code == 400 and "parameters" in reply.json()["error"]["message"]


def test_a_source_with_many_requests_does_not_hold_up_another() -> None:
    """Ann's comes in the next turn of the loop, however many of Bob's wait."""

    async def scenario() -> list[str]:
        turns = Turns()
        began: list[str] = []

        async def request(source: str) -> None:
            await turns.take(source)
            began.append(source)

        waiting = [asyncio.ensure_future(request("bob")) for _ in range(50)]
        await asyncio.sleep(0)
        waiting[3].cancel()
        waiting += [asyncio.ensure_future(request("ann")) for _ in range(2)]
        await asyncio.wait(waiting)
        return began

    began = asyncio.run(scenario())
    assert (began.count("bob"), began.count("ann")) == (49, 2)
    assert began.index("ann") < 4 and "ann" in began[began.index("ann") + 1 :][:4]


def until_answered(url: str) -> None:
    """Until the server has noticed that a connection is gone; the test's own time-out is the limit."""
    while web.get(f"{url}/health", headers={"Connection": "close"}).status_code != 200:
        pass


@pytest.mark.slow
def test_large_requests_together_are_bounded_until_they_are_answered(backend: FakeBackend) -> None:
    large = {"model": MODEL, "prompt": "x" * 3 * INLINE_BYTES}
    gate = Gate()
    backend.acquisitions.append(gate)
    with running(make_app(backend, max_held_bytes=6 * INLINE_BYTES)) as (url, _):
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
    with held.request("ann", MAX_BODY_BYTES) as one:
        for piece in (INLINE_BYTES - 1, 2, 400):
            one.add(piece)
        assert held.held_bytes == 401
        with held.request("bob", MAX_BODY_BYTES) as two, held.request("cat", MAX_BODY_BYTES) as three:
            two.add(INLINE_BYTES + 499)
            three.add(INLINE_BYTES + 100)
            assert held.held_bytes == 1000
            with pytest.raises(TooMuchHeld, match=r"of large requests [(]"):
                two.add(1)
        assert held.held_bytes == 401
        with held.request("bob", 10) as small, pytest.raises(BodyTooLarge):
            small.add(11)
        with held.request("ann", MAX_BODY_BYTES) as more, pytest.raises(TooMuchHeld, match=r" of yours"):
            more.add(INLINE_BYTES + 100)  # half of all is the most for one
    assert held.held_bytes == 0


def test_connections_leave_open_files_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (1024, 4096))
    assert (limits.connection_limit(), limits.connection_limit_of_address()) == (768, 384)
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (limits.resource.RLIM_INFINITY,) * 2)
    assert limits.connection_limit() == limits.MAX_CONNECTIONS
