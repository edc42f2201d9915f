"""Arriero's own routes over a real socket, and that every route and error is in the documentation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gateway_fakes import MODEL, FakeBackend, Gate, connect, running, serve, web

from actors.gateway.app import make_app
from actors.gateway.errors import ERRORS, error_body, error_from_body
from actors.records import Health, LoadResult, ModelInfo, Notice, PinResult, Plan, Status, UnloadResult
from scheduler.errors import ArrieroError, Impossible, InvariantBroken, QueueFull, Unavailable, UnknownModel

DOCS = Path(__file__).parents[2] / "docs"


def notice(seq: int) -> Notice:
    return Notice(seq=seq, at_s=1.5, kind="ReplicaReady", message=f"news {seq}", model=MODEL, data={"load_s": 0.5})


def test_status(url: str) -> None:
    status = Status.model_validate_json(web.get(f"{url}/api/v1/status").content)
    assert (status.gpus[0].label, status.replicas[0].model, status.nodes[0].hostname) == ("gpu0", MODEL, "box")
    assert status.queue[0].reason == "loading"


def test_plan_starts_nothing(url: str, backend: FakeBackend) -> None:
    plan = Plan.model_validate_json(web.get(f"{url}/api/v1/plan?model={MODEL}&n_ctx=512").content)
    assert (plan.verdict, plan.victims[0].frees, plan.shares[0].free_after_bytes) == ("evict", {"gpu0": 50}, 101)
    assert backend.journal == [("plan", MODEL, 512)]


def test_orders(url: str) -> None:
    load = LoadResult.model_validate_json(web.post(f"{url}/api/v1/load", json={"model": MODEL, "n_ctx": 64}).content)
    assert (load.model, load.n_ctx) == (MODEL, 64)
    unload = UnloadResult.model_validate_json(web.post(f"{url}/api/v1/unload", json={"model": MODEL}).content)
    assert unload.replicas == ["r0"]
    pin = PinResult.model_validate_json(web.post(f"{url}/api/v1/pin", json={"model": MODEL, "pinned": False}).content)
    assert not pin.pinned


def test_models_include_the_invalid_ones(url: str) -> None:
    models = [ModelInfo.model_validate(item) for item in web.get(f"{url}/api/v1/models").json()]
    assert [(model.name, model.state) for model in models][-1] == ("broken", "invalid")


@pytest.mark.parametrize(
    ("query", "headers", "seqs"),
    [
        ("", {}, [1, 2, 3]),
        ("&after=1", {}, [2, 3]),
        ("", {"Last-Event-ID": "2"}, [3]),
        ("&after=1", {"Last-Event-ID": "2"}, [3]),
        ("&after=3", {}, []),
    ],
)
def test_events_continue_where_the_reader_left(
    backend: FakeBackend, query: str, headers: dict[str, str], seqs: list[int]
) -> None:
    backend.news = [notice(seq) for seq in (1, 2, 3)]
    with serve(backend) as url:
        text = web.get(f"{url}/api/v1/events?follow=false{query}", headers=headers).text
    blocks = [block.split("\n") for block in text.split("\n\n") if block]
    assert [block[0] for block in blocks] == [f"id: {seq}" for seq in seqs]
    assert [Notice.model_validate(json.loads(block[1][6:])) for block in blocks] == [notice(seq) for seq in seqs]


def test_events_follow_and_are_kept_alive(backend: FakeBackend) -> None:
    backend.news = [notice(1)]
    with serve(backend, pulse_s=0.01) as url, web.stream("GET", f"{url}/api/v1/events") as reply:
        lines = reply.iter_lines()
        assert next(lines) == "id: 1"
        assert next(line for line in lines if line.startswith(":")) == ": waiting"


def test_who_leaves_takes_his_plan_along(backend: FakeBackend) -> None:
    gate = Gate()
    backend.plans.append(gate)
    ask = b"GET /api/v1/plan?model=gone HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with running(make_app(backend)) as (url, server), connect(url) as first:
        first.sendall(ask.replace(b"gone", b"first"))
        backend.wait_for("plan")
        for _ in range(5):  # plans are made one at a time
            with connect(url) as left:
                left.sendall(ask)
        assert web.get(f"{url}/health").status_code == 200
        while len(server.server_state.connections) > 2:  # the first one's, and that of these questions
            assert web.get(f"{url}/health").status_code == 200
        gate.open()
        assert web.get(f"{url}/api/v1/plan?model=mine").status_code == 200
    assert [model for model, _ in backend.saw("plan")] == ["first", "mine"]


@pytest.mark.parametrize("path", ["/health", "/api/v1/health"])
def test_health(url: str, backend: FakeBackend, path: str) -> None:
    reply = web.get(url + path)
    assert (reply.status_code, reply.json()["status"]) == (200, "ok")
    backend.health_now = Health(status="failing", version="0.1.0", reasons=["no node has reported for 30 s"])
    reply = web.get(url + path)
    assert (reply.status_code, reply.json()["reasons"]) == (503, ["no node has reported for 30 s"])
    backend.failing = Unavailable("the scheduler does not answer", retry_after_s=5.0)
    reply = web.get(url + path)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "says"),
    [
        ("POST", "/api/v1/load", {"model": MODEL, "nctx": 5}, 400, "invalid_request", "nctx"),
        ("POST", "/api/v1/load", {}, 400, "invalid_request", "model"),
        ("GET", "/api/v1/plan", None, 400, "invalid_request", "model"),
        ("GET", "/api/v1/events?after=-4", None, 400, "invalid_request", "after"),
        ("GET", "/api/v1/nothing", None, 404, "no_such_route", "/api/v1/nothing"),
        ("GET", "/v1/chat/completions", None, 404, "no_such_route", "GET /v1/chat/completions"),
    ],
)
def test_wrong_requests(url: str, method: str, path: str, body: object, status: int, code: str, says: str) -> None:
    reply = web.request(method, url + path, json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (status, code)
    assert says in error["message"]


@pytest.mark.parametrize(
    ("content", "content_type", "says"),
    [
        ("{not json", "application/json", "JSON"),
        ('{"model": "tiny"}', "text/plain", "Content-Type: application/json"),
        ("[" * 10_000, "application/json", "200 levels"),
        ("[1]", "application/json", "JSON object"),
    ],
)
def test_a_body_that_is_not_json(url: str, content: str, content_type: str, says: str) -> None:
    reply = web.post(f"{url}/api/v1/load", content=content, headers={"Content-Type": content_type})
    assert reply.status_code == 400
    assert says in reply.json()["error"]["message"]


def test_an_unforeseen_failure_is_ours(url: str, backend: FakeBackend) -> None:
    backend.failing = ZeroDivisionError("a bug")
    reply = web.get(f"{url}/api/v1/status")
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.code)
def test_errors_survive_the_wire(kind: type[ArrieroError]) -> None:
    error = kind("what and why", param="model", retry_after_s=2.5)
    back = error_from_body(json.loads(json.dumps(error_body(error))), error.http_status)
    assert (type(back), back.message, back.details) == (kind, error.message, error.details)


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ("<html>Bad gateway</html>", 502, Unavailable),
        ({"detail": "nope"}, 418, ArrieroError),
        ({"error": {"message": "m", "code": "of_tomorrow"}}, 500, ArrieroError),
        ({"error": {"message": "m", "code": "of_tomorrow"}}, 409, ArrieroError),
    ],
)
def test_answers_that_are_not_ours(body: object, status: int, kind: type[ArrieroError]) -> None:
    assert isinstance(error_from_body(body, status), kind)


def test_kinds_of_error_that_openai_clients_know() -> None:
    kinds = [error_body(kind("m"))["error"]["type"] for kind in (UnknownModel, Impossible, QueueFull, InvariantBroken)]
    assert kinds == ["invalid_request_error", "invalid_request_error", "rate_limit_error", "server_error"]


def test_the_documentation_has_every_route_and_every_error() -> None:
    text = (DOCS / "http_api.md").read_text()
    paths = make_app(FakeBackend()).openapi()["paths"]
    missing = [
        f"{method.upper()} {path}"
        for path, methods in paths.items()
        for method in methods
        if f"`{method.upper()} {path}`" not in text
    ]
    missing += [kind.code for kind in ERRORS if f"| `{kind.code}` | {kind.http_status} |" not in text]
    assert not missing
