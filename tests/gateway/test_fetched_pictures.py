"""Pictures at addresses: fetched from the hosts of the catalogue, within limits, and from nowhere else."""

from __future__ import annotations

import asyncio
import json
import socket
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from gateway_fakes import MODEL, FakeBackend, Stage, all_of, connect, content, head_of, running, web
from picture_host import MIB, PNG, PictureHost, picture_host

from actors.gateway import fetching
from actors.gateway.app import make_app
from actors.gateway.attached import Fetch
from actors.gateway.openai_requests import Ask
from actors.gateway.seats import Seats
from scheduler.server import parse_origin

CHATS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
KEYS = {"ann": "a-key-for-ann", "ben": "a-key-for-ben"}
ANN, BEN = ({"Authorization": f"Bearer {key}"} for key in KEYS.values())


@pytest.fixture(scope="module")
def host() -> Iterator[PictureHost]:
    with picture_host() as host:
        yield host


@pytest.fixture(scope="module")
def gateway(host: PictureHost) -> Iterator[tuple[str, Stage]]:
    """Two users share it."""
    stage = Stage()
    allowed = [parse_origin(f"http://127.0.0.1:{host.port}"), parse_origin("images.example.org")]
    with running(make_app(stage, KEYS, media_hosts=allowed)) as (url, _):
        yield url, stage


@pytest.fixture
def url(gateway: tuple[str, Stage], backend: FakeBackend, host: PictureHost) -> str:
    gateway[1].backend = backend
    host.seen.clear()
    host.left.clear()
    return gateway[0]


def chat(*addresses: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": address}} for address in addresses]
    return {"model": MODEL, "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]}


def asked(url: str, *addresses: str) -> Any:
    return web.post(f"{url}{CHATS}", json=chat(*addresses), headers=ANN)


def data_of(backend: FakeBackend) -> list[str]:
    """The files of the only request that came to a runner."""
    ((_, request),) = backend.wait_for("generate")
    (message,) = content(request)["messages"]
    return [part["data"] for part in message["content"] if part["type"] == "image"]


def bodies(address: str) -> dict[str, tuple[str, dict[str, Any]]]:
    block = {"type": "image", "source": {"type": "url", "url": address}}
    part = {"type": "input_image", "image_url": address}
    return {
        "chat": (CHATS, chat(address)),
        "responses": (RESPONSES, {"model": MODEL, "input": [{"role": "user", "content": [part]}]}),
        "messages": (
            MESSAGES,
            {"model": MODEL, "max_tokens": 5, "system": "s", "messages": [{"role": "user", "content": [block]}]},
        ),
        "count": (f"{MESSAGES}/count_tokens", {"model": MODEL, "messages": [{"role": "user", "content": [block]}]}),
    }


@pytest.mark.parametrize("dialect", bodies(""))
def test_every_dialect_may_send_an_address(dialect: str, url: str, backend: FakeBackend, host: PictureHost) -> None:
    path, body = bodies(host.url("/ok"))[dialect]
    reply = web.post(f"{url}{path}", json=body, headers=ANN)
    assert reply.status_code == 200, reply.text
    ((_, request),) = backend.wait_for("generate")
    (image,) = [part for part in content(request)["messages"][-1]["content"] if part["type"] == "image"]
    assert image["data"] == b64encode(PNG).decode()
    assert [path for path, _ in host.seen] == ["/ok"]


def test_files_stand_in_their_places(url: str, backend: FakeBackend, host: PictureHost) -> None:
    sent = b64encode(b"sent").decode()
    sizes = [10, 49152, 7, 100_000]
    addresses = [host.url(f"/of_size/{size}") for size in sizes]
    reply = asked(url, addresses[0], f"data:image/png;base64,{sent}", *addresses[1:])
    assert reply.status_code == 200, reply.text
    data = data_of(backend)
    assert data[1] == sent
    assert [data[0], *data[2:]] == [b64encode(b"\x89PNG" + b"\0" * (size - 4)).decode() for size in sizes]


def test_requests_with_the_same_addresses_are_the_same(url: str, backend: FakeBackend, host: PictureHost) -> None:
    for path in ("/ok", "/ok", "/untyped"):
        assert asked(url, host.url(path)).status_code == 200
    needs = [need for (need,) in backend.saw("acquire")]
    assert needs[0].fingerprint == needs[1].fingerprint != needs[2].fingerprint
    assert needs[0].prefix == needs[1].prefix != needs[2].prefix


def test_a_host_is_told_nothing_of_this_machine(
    url: str, backend: FakeBackend, host: PictureHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # no proxy is asked either
    for _ in range(2):
        assert asked(url, host.url("/ok")).status_code == 200
    for _, headers in host.seen:
        assert set(headers) == {"host", "accept", "accept-encoding", "user-agent", "connection"}
        assert headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:{other}/ok",
        "https://127.0.0.1:{port}/ok",
        "http://localhost:{port}/ok",
        "http://127.0.0.1.:{port}/ok",
        "http://127.1:{port}/ok",
        "http://2130706433:{port}/ok",
        "http://127.0.0.1:{other}@localhost:{port}/ok",
        "http://localhost:{port}#@127.0.0.1:{port}/ok",
        "http://localhost:{port}\\@127.0.0.1:{port}/ok",
        "http://images.example.org/x.png",
        "https://images.example.org.evil.example/x.png",
        "https://xn--images-.example.org/x.png",
        "http:///ok",
        "http://[::1]:{port}/ok",
    ],
)
def test_other_hosts_are_refused_by_name_of_the_key(
    address: str, url: str, backend: FakeBackend, host: PictureHost
) -> None:
    reply = asked(url, address.format(port=host.port, other=host.port + 1))
    assert reply.status_code == 400
    message = reply.json()["error"]["message"]
    causes = ("media_hosts", "not a valid URL", "invalid URL", "is not a URL", "user name or password")
    assert any(cause in message for cause in causes)
    assert reply.json()["error"]["param"] == "messages.0.content"
    assert not host.seen and not backend.saw("acquire")


def test_a_password_in_an_address_is_refused(url: str, backend: FakeBackend, host: PictureHost) -> None:
    reply = asked(url, f"http://ann:secret@127.0.0.1:{host.port}/ok")
    assert reply.status_code == 400 and "user name or password" in reply.text and "secret" not in reply.text
    assert not host.seen


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/gone", "HTTP status 404"),
        ("/gr\u00fcn", "write them as %xx"),
        ("/broken", "HTTP status 500"),
        ("/page", "'text/html', which is not a picture"),
        ("/packed", "compressed"),
        ("/empty", "is empty"),
        ("/cut", "cannot be fetched"),
        ("/nonsense", "cannot be fetched"),
        ("/redirect/4", "more than 3 redirects"),
        ("/away/http://localhost:1/ok", "media_hosts"),
        ("/away/file:///etc/passwd", "media_hosts"),
        ("/away///localhost/", "media_hosts"),
        (f"/of_size/{20 * MIB + 1}", "larger than 20.0 MiB"),
        ("/endless", "larger than 20.0 MiB"),
        ("/crumbs", "pieces of a few bytes"),
    ],
)
def test_what_is_no_picture_is_refused(
    path: str, named: str, url: str, backend: FakeBackend, host: PictureHost
) -> None:
    reply = asked(url, host.url(path))
    assert reply.status_code == 400, reply.text
    message = reply.json()["error"]["message"]
    assert named in message and "secret" not in message and len(message) < 500
    assert not backend.saw("acquire")


def test_redirects_to_allowed_hosts_are_followed(url: str, backend: FakeBackend, host: PictureHost) -> None:
    assert asked(url, host.url("/redirect/3")).status_code == 200
    assert data_of(backend) == [b64encode(PNG).decode()]
    assert [path for path, _ in host.seen] == ["/redirect/3", "/redirect/2", "/redirect/1", "/ok"]
    assert all("cookie" not in headers for _, headers in host.seen)


def test_nobody_listens_there(backend: FakeBackend) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with running(make_app(backend, media_hosts=[parse_origin(f"http://127.0.0.1:{port}")])) as (url, _):
        reply = web.post(f"{url}{CHATS}", json=chat(f"http://127.0.0.1:{port}/x"))
    assert reply.status_code == 400 and "cannot be fetched from '127.0.0.1'" in reply.text


def test_without_hosts_nothing_is_fetched(backend: FakeBackend, host: PictureHost) -> None:
    with running(make_app(backend)) as (url, _):
        for path, body in bodies(host.url("/ok")).values():
            reply = web.post(f"{url}{path}", json=body)
            assert reply.status_code == 400
            assert "media_hosts of the catalogue" in reply.text and "data:image/png;base64" in reply.text
    assert not backend.saw("acquire")


def test_a_slow_host_has_its_time(
    url: str, backend: FakeBackend, host: PictureHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "FETCH_S", 0.2)
    reply = asked(url, host.url("/silent"))
    assert reply.status_code == 400 and "it took more than" in reply.text
    host.wait_for("left")


def test_a_request_waits_only_so_long(
    url: str, backend: FakeBackend, host: PictureHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "MAX_FETCH_WAIT_S", 0.5)
    reply = asked(url, *[host.url("/silent")] * 3)
    assert reply.status_code == 503 and "were not fetched within" in reply.text
    host.wait_for("left", 2)
    assert len(host.seen) == 2  # the third had no turn


def test_a_client_that_leaves_ends_what_is_fetched_for_it(url: str, backend: FakeBackend, host: PictureHost) -> None:
    body = json.dumps(chat(host.url("/silent"), host.url("/silent"))).encode()
    head = head_of(CHATS, len(body)).replace(b"Host:", b"Authorization: Bearer a-key-for-ann\r\nHost:")
    with connect(url) as client:
        client.sendall(head + body)
        host.wait_for("seen", 2)
        assert not host.left
    host.wait_for("left", 2)
    assert asked(url, host.url("/ok")).status_code == 200  # and their seats are free


def test_one_users_slow_files_leave_room_for_others(url: str, backend: FakeBackend, host: PictureHost) -> None:
    body = json.dumps(chat(*[host.url("/silent")] * 9)).encode()
    head = head_of(CHATS, len(body)).replace(b"Host:", b"Authorization: Bearer a-key-for-ann\r\nHost:")
    with connect(url) as client:
        client.sendall(head + body)
        host.wait_for("seen", 2)
        reply = web.post(f"{url}{CHATS}", json=chat(host.url("/ok")), headers=BEN)
        assert reply.status_code == 200, reply.text
        assert [path for path, _ in host.seen].count("/silent") == 2


def test_one_wrong_address_ends_the_others(url: str, backend: FakeBackend, host: PictureHost) -> None:
    reply = asked(url, host.url("/silent"), host.url("/gone"))
    assert reply.status_code == 400 and "404" in reply.text
    host.wait_for("left")


def test_all_files_together_are_limited(url: str, backend: FakeBackend, host: PictureHost) -> None:
    reply = asked(url, *[host.url(f"/of_size/{11 * MIB}")] * 2)
    assert reply.status_code == 400 and "more than 20.0 MiB together" in reply.text
    reply = asked(url, *[host.url("/ok")] * 101)
    assert reply.status_code == 400 and "more than 100 files" in reply.text


def test_fetched_files_count_as_held(backend: FakeBackend, host: PictureHost) -> None:
    allowed = [parse_origin(f"http://127.0.0.1:{host.port}")]
    with running(make_app(backend, max_held_bytes=2 * MIB, media_hosts=allowed)) as (url, _):
        reply = web.post(f"{url}{CHATS}", json=chat(host.url(f"/of_size/{MIB}")))
        assert reply.status_code == 429 and "holds" in reply.text
        assert web.post(f"{url}{CHATS}", json=chat(host.url("/ok"))).status_code == 200


def test_a_gateway_that_closes_ends_what_it_fetches(backend: FakeBackend, host: PictureHost) -> None:
    allowed = [parse_origin(f"http://127.0.0.1:{host.port}")]
    host.seen.clear()
    host.left.clear()
    with running(make_app(backend, media_hosts=allowed)) as (url, server), connect(url) as client:
        body = json.dumps(chat(host.url("/silent"))).encode()
        client.sendall(head_of(CHATS, len(body)) + body)
        host.wait_for("seen")
        server.close()
        assert b"503" in all_of(client).partition(b"\r\n")[0]
    host.wait_for("left")


def test_templates_are_shown_without_fetching(url: str, backend: FakeBackend, host: PictureHost) -> None:
    reply = web.post(f"{url}/apply-template", json=chat(host.url("/ok")), headers=ANN)
    assert reply.status_code == 200, reply.text
    assert not host.seen


async def _seated(seats: Seats, source: str, told: list[str], until: asyncio.Event) -> None:
    async with seats.one(source):
        told.append(source)
        await until.wait()


def test_sources_take_turns() -> None:
    async def play() -> None:
        seats, told, events = Seats(2, 1), [], [asyncio.Event() for _ in range(6)]
        tasks = [
            asyncio.ensure_future(_seated(seats, source, told, event))
            for source, event in zip("aaabca", events, strict=True)
        ]

        async def settled() -> str:
            for _ in range(9):
                await asyncio.sleep(0)
            return "".join(told)

        assert await settled() == "ab"
        tasks[1].cancel()  # it waited
        events[0].set()
        assert await settled() == "aba"
        tasks[2].cancel()  # it has a seat
        assert await settled() == "abac"  # not a third of a's
        events[3].set()
        assert await settled() == "abaca"
        for event in events:
            event.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with seats.one("a"), seats.one("b"):
            told.append("end")

    asyncio.run(play())


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("images.example.org", "https://images.example.org:443"),
        ("HTTPS://Images.Example.org", "https://images.example.org:443"),
        ("http://images.local", "http://images.local:80"),
        ("images.local:8443", "https://images.local:8443"),
        ("http://[::1]:8080", "http://[::1]:8080"),
    ],
)
def test_hosts_of_the_catalogue(given: str, origin: str) -> None:
    assert parse_origin(given) == origin


@pytest.mark.parametrize(
    "given", ["*", "*.example.org", "http://a/b", "ftp://a", "a b", "", "a@b", "-a", "a:", "http://"]
)
def test_what_is_no_host(given: str) -> None:
    with pytest.raises(ValueError, match="is not a host"):
        parse_origin(given)


def crowd(monkeypatch: pytest.MonkeyPatch, n_requests: int) -> tuple[list[int], list[int]]:
    """So many requests of 100 addresses at a host that says nothing, and then their clients leave: how many addresses
    were read in each turn of the loop, and how many tasks there were at a time."""
    addresses = [Fetch(f"messages.{index}", f"http://box/{index}", 0) for index in range(100)]
    ask = SimpleNamespace(fetches=addresses, request=SimpleNamespace(content=b""))
    turn, read, tasks = [0], Counter[int](), []
    allowed = fetching.Fetcher._allowed

    def counted(fetcher: fetching.Fetcher, param: str, given: Any) -> Any:
        read[turn[0]] += 1
        return allowed(fetcher, param, given)

    async def silent(aside: Any, work: Any) -> bytes:
        work.close()
        await asyncio.sleep(3600)
        return b""

    monkeypatch.setattr(fetching.Fetcher, "_allowed", counted)
    monkeypatch.setattr(fetching._Aside, "run", silent)

    async def watched() -> None:
        fetcher = fetching.Fetcher([parse_origin("http://box:80")])
        requests = [
            asyncio.ensure_future(fetcher.complete(cast(Ask, ask), "ann", lambda n_bytes: None))
            for _ in range(n_requests)
        ]
        while read.total() < 100 * n_requests:
            turn[0] += 1
            tasks.append(len(asyncio.all_tasks()))
            await asyncio.sleep(0)
        tasks.append(len(asyncio.all_tasks()))
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)

    asyncio.run(watched())
    return list(read.values()), tasks


def test_many_requests_with_many_addresses_are_few_tasks_and_short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    read, tasks = crowd(monkeypatch, 30)
    assert sum(read) == 3_000 and max(read) == 1
    assert max(tasks) <= 1 + 30 * (1 + fetching.FETCHES_OF_ONE)
