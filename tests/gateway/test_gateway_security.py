"""Who gets in: keys, names, origins, sizes; and where the gateway agrees to listen."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import pytest
from gateway_fakes import MODEL, FakeBackend, serve, web

from actors.gateway.address import check_exposure, is_loopback
from actors.gateway.security import MAX_BODY_BYTES
from actors.gateway.server import listen, url_of
from scheduler.errors import Rejected

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def keyed() -> Iterator[str]:
    with serve(FakeBackend(), api_keys={"": "schlüssel"}) as url:
        yield url


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer  x", "Bearer schlussel", "Basic schlüssel", "schlüssel", "Bearer schlüsselx"],
)
@pytest.mark.parametrize("path", ["/v1/models", "/api/v1/status", "/openapi.json", "/nothing"])
def test_no_key_no_answer(keyed: str, path: str, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization.encode()}
    reply = web.get(keyed + path, headers=headers)  # type: ignore[arg-type]
    assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_the_key_opens(keyed: str, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} schlüssel".encode(), "Host": "gpu.lan", "Origin": "https://ui.lan"}
    reply = web.get(f"{keyed}/api/v1/status", headers=headers)  # type: ignore[arg-type]
    assert reply.status_code == 200


def test_a_request_is_known_by_the_name_of_its_key() -> None:
    backend = FakeBackend()
    with serve(backend, api_keys={"ann": "a-secret", "ben": "b-secret"}) as url:
        for key, status in (("b-secret", 200), ("a-secret", 200), ("c-secret", 401)):
            body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "priority": 3}
            headers = {"Authorization": f"Bearer {key}"}
            assert web.post(f"{url}/v1/chat/completions", json=body, headers=headers).status_code == status
    needs = [request for (request,) in backend.wait_for("acquire", 2)]
    assert [(need.key, need.priority) for need in needs] == [("ben", 3), ("ann", 3)]


@pytest.mark.parametrize("path", ["/health", "/api/v1/health"])
def test_health_is_open(keyed: str, path: str) -> None:
    assert web.get(keyed + path, headers={"Host": "probe.lan"}).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:11535", "[::1]", "[::1]:11535"])
def test_loopback_names_are_answered(url: str, host: str) -> None:
    assert web.get(f"{url}/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:11535", "localhost.evil.example", "[", "", "0.0.0.0"])
def test_other_names_are_refused(url: str, host: str) -> None:
    reply = web.get(f"{url}/v1/models", headers={"Host": host})
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "forbidden")
    assert "API key" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://localhost:3000", 200), ("http://127.0.0.1", 200), ("https://evil.example", 403), ("null", 403)],
)
def test_pages_of_other_sites_are_refused(url: str, origin: str, status: int) -> None:
    reply = web.post(f"{url}/api/v1/unload", json={"model": "tiny"}, headers={"Origin": origin})
    assert reply.status_code == status
    assert "access-control-allow-origin" not in reply.headers


def test_a_body_that_says_it_is_too_large_is_not_read(url: str, backend: FakeBackend) -> None:
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port or 0)) as connection:
        connection.sendall(
            b"POST /api/v1/load HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1)
        )
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert not backend.journal


def test_a_body_that_turns_out_too_large_is_dropped(url: str, backend: FakeBackend) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(MAX_BODY_BYTES // 2**20 + 1):
            yield b" " * 2**20

    reply = httpx.post(f"{url}/api/v1/load", content=endless(), headers=JSON, trust_env=False)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
    assert not backend.journal


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.8.9.10"])
def test_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    check_exposure(host, {})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.10", "gpu.lan", ""])
def test_a_wider_binding_needs_a_key(host: str) -> None:
    with pytest.raises(Rejected, match=r"--api-key or ARRIERO_API_KEY"):
        check_exposure(host, {})
    check_exposure(host, {"": "key"})


def test_an_empty_key_is_a_mistake() -> None:
    with pytest.raises(Rejected, match="empty"):
        check_exposure("127.0.0.1", {"": " "})


def test_a_taken_port_is_an_error_that_names_it() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert url_of(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(Rejected, match=f"port {port}.*--port"):
            listen("127.0.0.1", port)


def test_a_wide_binding_is_reached_through_loopback() -> None:
    with listen("0.0.0.0", 0) as listener:
        assert url_of(listener).startswith("http://127.0.0.1:")


def test_small_pieces_are_sent_at_once() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
