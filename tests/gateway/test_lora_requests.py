"""LoRA adapters in requests: llama-server's field, on every route that has its samplers."""

from __future__ import annotations

import re
from typing import Any

import pytest
from gateway_fakes import MODEL, FakeBackend, web

from actors.gateway.hashes import fingerprint_of, prefix_of
from actors.gateway.lora_settings import MAX_ADAPTERS
from actors.road import packed_generate, read_generate
from actors.serving.protocol import GenerateRequest
from scheduler.units import LeaseId

MESSAGES = [{"role": "user", "content": "Hi"}]
ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("v1/chat/completions", {"messages": MESSAGES}),
    ("v1/completions", {"prompt": "p"}),
    ("v1/responses", {"input": "Hi"}),
    ("completion", {"prompt": "p"}),
    ("infill", {"input_prefix": "a", "input_suffix": "b"}),
    ("v1/messages", {"messages": MESSAGES, "max_tokens": 9}),
    ("v1/messages/count_tokens", {"messages": MESSAGES}),
    ("api/chat", {"messages": MESSAGES}),
    ("api/generate", {"prompt": "p"}),
    ("api/generate", {"prompt": "p", "raw": True}),
]
LORA = [{"id": 0, "scale": 0.5}, {"name": "fun", "scale": -1}]


def with_lora(route: str, lora: object) -> dict[str, Any]:
    """Ollama's clients can send settings of their own in `options` only."""
    return {"options": {"lora": lora}} if route.startswith("api/") else {"lora": lora}


@pytest.mark.parametrize(("route", "body"), ROUTES)
def test_every_route_takes_adapters(url: str, backend: FakeBackend, route: str, body: dict[str, Any]) -> None:
    prefixes = []
    for given, seen in ((None, None), ([], ()), (LORA, ((0, 0.5), ("fun", -1.0)))):
        assert web.post(f"{url}/{route}", json={"model": MODEL, **body, **with_lora(route, given)}).status_code == 200
        (need,), request = backend.saw("acquire")[-1], backend.saw("generate")[-1][-1]
        assert request.lora == seen
        prefixes.append((need.prefix, need.fingerprint))
    assert prefixes[0][0] == prefixes[1][0] != prefixes[2][0]
    assert prefixes[0][1] != prefixes[2][1]


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ([{"scale": 1}], "by its id or by its name"),
        ([{"id": 0, "name": "fun", "scale": 1}], "by its id or by its name"),
        ([{"id": 0}], "scale"),
        ([{"id": -1, "scale": 1}], "greater than or equal to 0"),
        ([{"id": 0, "scale": 16.1}], "less than or equal to 16"),
        ([{"id": 0, "scale": "1e999"}], "finite|less than"),
        ([{"id": 0, "scale": 1}] * (MAX_ADAPTERS + 1), f"at most {MAX_ADAPTERS} items"),
        ({"id": 0, "scale": 1}, "list"),
    ],
)
@pytest.mark.parametrize(("route", "body"), [ROUTES[0], ROUTES[3], ROUTES[5], ROUTES[7]])
def test_what_names_no_adapter_is_refused(
    url: str, backend: FakeBackend, route: str, body: dict[str, Any], lora: Any, words: str
) -> None:
    reply = web.post(f"{url}/{route}", json={"model": MODEL, **body, **with_lora(route, lora)})
    assert reply.status_code == 400
    error = reply.json()["error"]  # Ollama's is a text, Anthropic's has no param
    message = error if isinstance(error, str) else error["message"]
    assert re.match(r"(options\.)?lora", message)
    assert re.search(words, message), message
    assert not backend.saw("generate")


def test_the_adapters_of_a_model_are_told(url: str) -> None:
    reply = web.get(f"{url}/lora-adapters", params={"model": MODEL})
    assert reply.json() == [{"id": 0, "name": "fun", "scale": 0.5, "path": "/m/fun.gguf"}]
    assert web.get(f"{url}/lora-adapters", params={"model": "team/big"}).json() == []
    assert web.get(f"{url}/lora-adapters", params={"model": "nope"}).status_code == 404
    assert web.get(f"{url}/lora-adapters").status_code == 400
    reply = web.post(f"{url}/lora-adapters", json=[{"id": 0, "scale": 0}])
    assert reply.status_code == 400 and "send lora with each" in reply.json()["error"]["message"]


@pytest.mark.parametrize("lora", [None, (), ((0, 0.25), ("fun", -1.0))])
def test_adapters_travel_to_the_runner(lora: Any) -> None:
    request = GenerateRequest(b"{}", "lease", lora=lora)
    assert read_generate(b"".join(packed_generate(request)), LeaseId("lease")) == request


def test_requests_with_other_adapters_are_others() -> None:
    one, other = (GenerateRequest(b"{}", lora=((0, scale),)) for scale in (0.5, 0.25))
    assert fingerprint_of("m", one) != fingerprint_of("m", other)
    assert prefix_of("Hi", one.lora) != prefix_of("Hi", other.lora) != prefix_of("Hi")
