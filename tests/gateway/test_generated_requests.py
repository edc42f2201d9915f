"""Requests that Schemathesis makes from the OpenAPI document: all are answered, as it says, and never with 5xx."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
from gateway_fakes import MODEL, FakeBackend, serve
from hypothesis import HealthCheck, given, settings

from actors.gateway.app import make_app

schemathesis = pytest.importorskip("schemathesis", reason="it needs Python 3.11")

PATIENCE_S = 20.0
STREAM_WITHOUT_END = "/api/v1/events"
DOCUMENT = make_app(FakeBackend()).openapi()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT).exclude(path=STREAM_WITHOUT_END)
OPERATIONS = [found.ok() for found in SCHEMA.get_all_operations()]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """In a process of its own: in Python 3.11, two threads cannot read source at once (a SystemError). Hypothesis reads
    that of lambdas, and a gateway in a thread would read that of tracebacks."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    gateway = context.Process(target=_serve, args=[theirs], daemon=True)
    gateway.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        ours.close()
        gateway.join()


def _serve(pipe: Connection) -> None:
    with serve(FakeBackend(), pulse_s=0.5) as url:
        pipe.send(url)
        with contextlib.suppress(EOFError):
            pipe.recv()


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
@pytest.mark.slow
def test_no_request_makes_the_gateway_fail(url: str, operation: Any) -> None:
    """Half of those that name a model name the one that there is."""

    told = DOCUMENT["paths"][operation.path][operation.method]["responses"]

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str) and len(case.body["model"]) % 2:
            case.body["model"] = MODEL
        reply = case.call(base_url=url, timeout=PATIENCE_S)
        assert reply.status_code < 500, reply.text
        assert str(reply.status_code) in told, f"{reply.status_code} is not in the document: {reply.text}"

    ask()
