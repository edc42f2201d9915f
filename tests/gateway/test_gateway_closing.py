"""A gateway that goes tells everybody: streams by a last event, all others by 503."""

from __future__ import annotations

import asyncio
import json

import pytest
from gateway_fakes import MODEL, FakeBackend, asked_in_process

from actors.gateway.app import make_app

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/v1/load", "/health", "/nothing"])
def test_a_new_request_is_refused(path: str) -> None:
    app = make_app(FakeBackend())
    app.state.closing.begin()
    status, said = asyncio.run(asked_in_process(app, path, json.dumps(CHAT).encode()))
    assert (status, json.loads(said)["error"]["code"]) == (503, "unavailable")
