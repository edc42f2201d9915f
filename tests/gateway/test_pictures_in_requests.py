"""Every dialect's way to send pictures and sounds becomes the same content; by default, nothing is fetched."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import pytest
from gateway_fakes import MODEL, FakeBackend, content, web

from actors.serving.protocol import GenerateRequest

DATA = b64encode(b"\x89PNG and so on").decode()
URL = f"data:image/png;base64,{DATA}"
IMAGE = {"type": "image", "data": DATA}
AUDIO = {"type": "audio", "data": DATA}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def user(content: object) -> dict[str, Any]:
    return {"role": "user", "content": content}


def url_part(url: object) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url}


ANTHROPIC = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}}
SOUND = {"type": "input_audio", "input_audio": {"data": DATA, "format": "wav"}}
CHATS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
ODD = [url_part(f"DATA:image/png;charset=utf-8;BASE64,{DATA}"), url_part(f"data:;base64,{DATA}")]
TAKEN: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "openai": (
        CHATS,
        {"messages": [user([text("a"), url_part({"url": URL, "detail": "low"}), text("b"), SOUND])]},
        [text("a"), IMAGE, text("b"), AUDIO],
    ),
    "openai, a bare url": (CHATS, {"messages": [user([url_part(URL)])]}, [IMAGE]),
    "openai, odd types": (CHATS, {"messages": [user(ODD)]}, [IMAGE, IMAGE]),
    "responses": (
        RESPONSES,
        {"input": [user([{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": URL}, SOUND])]},
        [text("a"), IMAGE, AUDIO],
    ),
    "anthropic": (MESSAGES, {"messages": [user([ANTHROPIC, text("a")])], "max_tokens": 9}, [IMAGE, text("a")]),
    "counted": (f"{MESSAGES}/count_tokens", {"messages": [user([ANTHROPIC, text("a")])]}, [IMAGE, text("a")]),
    "ollama": ("/api/chat", {"messages": [{**user("a"), "images": [DATA, DATA]}]}, [IMAGE, IMAGE, text("a")]),
    "ollama, a prompt": ("/api/generate", {"prompt": "a", "images": [DATA]}, [IMAGE, text("a")]),
}


@pytest.mark.parametrize("dialect", TAKEN)
def test_files_come_with_their_message(dialect: str, url: str, backend: FakeBackend) -> None:
    path, body, wanted = TAKEN[dialect]
    reply = web.post(f"{url}{path}", json={"model": MODEL, **body})
    assert reply.status_code == 200, reply.text
    ((_, request),) = backend.wait_for("generate")
    assert isinstance(request, GenerateRequest)
    assert content(request)["messages"] == [user(wanted)]


IN_CHATS: list[tuple[dict[str, Any], str]] = [
    (url_part("https://a.b/c.png"), "media_hosts"),
    (url_part({"url": "file:///etc"}), "data:"),
    (url_part("data:image/png,abc"), "base64"),
    (url_part(7), "needs a URL"),
    (url_part("data:image/png;base64,"), "file"),
    ({"type": "input_audio"}, "base64"),
    ({"type": "input_video"}, "'input_video'"),
]
ELSEWHERE: list[tuple[str, dict[str, Any], str, str]] = [
    (RESPONSES, {"input": [user([{"type": "input_image", "file_id": "f"}])]}, "input.0.content", "are stored"),
    (RESPONSES, {"input": [user([{"type": "input_image", "image_url": "http://a"}])]}, "input", "media_hosts"),
    (
        RESPONSES,
        {"input": [{"role": "system", "content": [{"type": "input_image", "image_url": URL}]}, user("x")]},
        "input.0.content",
        "input_image",
    ),
    ("/api/generate", {"prompt": "a", "images": [DATA], "raw": True}, "images", "template"),
    ("/api/chat", {"messages": [{**user("a"), "images": [""]}]}, "messages.0.images", "base64"),
]


@pytest.mark.parametrize(
    ("path", "body", "param", "named"),
    [(CHATS, {"messages": [user([part])]}, "messages.0.content", named) for part, named in IN_CHATS] + ELSEWHERE,
)
def test_what_is_no_file_is_refused_by_name(
    path: str, body: dict[str, Any], param: str, named: str, url: str, backend: FakeBackend
) -> None:
    reply = web.post(f"{url}{path}", json={"model": MODEL, **body})
    assert reply.status_code == 400
    assert param in reply.text and named in reply.text and len(reply.text) < 700
    assert not backend.saw("acquire")


def test_nothing_is_fetched_for_anthropics_clients(url: str, backend: FakeBackend) -> None:
    block = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:1/x.png"}}
    reply = web.post(f"{url}{MESSAGES}", json={"model": MODEL, "max_tokens": 5, "messages": [user([block])]})
    assert reply.status_code == 400 and "base64" in reply.json()["error"]["message"]
    assert not backend.saw("acquire")


def test_a_long_address_is_told_back_in_short(url: str, backend: FakeBackend) -> None:
    body = {"model": MODEL, "messages": [user([url_part("https://" + "x" * 3_000_000)])]}
    reply = web.post(f"{url}{CHATS}", json=body)
    assert reply.status_code == 400 and len(reply.text) < 700 and not backend.saw("acquire")


@pytest.mark.slow
def test_a_picture_of_20_mib_fits_the_body(url: str, backend: FakeBackend) -> None:
    data = "A" * (4 * (20 * 1024 * 1024) // 3)
    body = {"model": MODEL, "messages": [user([text("a"), url_part(f"data:image/png;base64,{data}")])]}
    reply = web.post(f"{url}{CHATS}", json=body)
    assert reply.status_code == 200, reply.text
    ((_, request),) = backend.wait_for("generate")
    assert content(request)["messages"][0]["content"][1]["data"] == data
