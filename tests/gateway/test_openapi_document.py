"""`/openapi.json` tells all that a route takes and all that it may answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.routing import APIRoute
from gateway_fakes import FakeBackend

from actors.gateway.app import make_app
from actors.gateway.dialects import ANTHROPIC, dialect_of
from actors.gateway.errors import ERRORS, error_body
from actors.gateway.openapi import ANYWHERE, BODIES, ERRORS_OF, errors_of
from scheduler.errors import ArrieroError

APP = make_app(FakeBackend())
DOCUMENT = APP.openapi()
ERROR = {"$ref": "#/components/schemas/Error"}
OPERATIONS = [(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods]


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_status_of_a_route_is_documented(path: str, method: str) -> None:
    responses = DOCUMENT["paths"][path][method]["responses"]
    for kind in errors_of(path):
        documented = responses[str(kind.http_status)]
        schema = documented["content"]["application/json"]["schema"]
        assert accepts(resolved(schema), json.loads(dialect_of(path).body(kind("m"))))
        assert f"`{kind.code}`" in documented["description"]
    assert {"200", "400", "401", "403", "404", "408", "413", "429", "499", "500", "503"} <= set(responses)


def test_every_error_belongs_to_a_route() -> None:
    told = {*ANYWHERE, *(kind for kinds in ERRORS_OF.values() for kind in kinds)}
    assert told == set(ERRORS)
    paths = set(DOCUMENT["paths"])
    assert set(ERRORS_OF) <= paths and set(BODIES) <= paths


def test_slots_have_every_error_of_the_scheduler() -> None:
    """All error classes of the product, but for those that are only a base."""
    kinds = subclasses(ArrieroError)
    assert set(errors_of("/v1/chat/completions")) == kinds


def subclasses(kind: type[ArrieroError]) -> set[type[ArrieroError]]:
    below = {one for one in kind.__subclasses__() if one.__module__.startswith(("scheduler.", "actors."))}
    return below.union(*(subclasses(one) for one in below))


@pytest.mark.parametrize(("path", "method"), [one for one in OPERATIONS if one[1] == "post"])
def test_every_route_that_takes_a_body_says_which(path: str, method: str) -> None:
    schema = DOCUMENT["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"]
    assert "model" in resolved(schema)["properties"]


def test_every_reference_leads_somewhere() -> None:
    references = set(re.findall(r"#/components/schemas/\w+", str(DOCUMENT)))
    assert len(references) > 10
    for reference in references:
        assert resolved({"$ref": reference})


def test_the_shape_of_errors_is_the_one_that_is_sent() -> None:
    shape = resolved(ERROR)["properties"]["error"]
    sent = error_body(ArrieroError("m"))["error"]
    assert set(sent) == set(shape["properties"]) == set(shape["required"])
    assert {error_body(kind("m"))["error"]["type"] for kind in ERRORS} == set(shape["properties"]["type"]["enum"])
    kinds = resolved({"$ref": "#/components/schemas/AnthropicError"})["properties"]["error"]["properties"]["type"]
    told = {json.loads(ANTHROPIC.body(kind("m")))["error"]["type"] for kind in ERRORS}
    assert told == set(kinds["enum"])


def accepts(schema: dict[str, Any], body: Any) -> bool:
    """Whether `body` has the fields of `schema`, no others, and the values that it lists."""
    if "properties" in schema:
        properties = schema["properties"]
        return set(body) == set(properties) and all(accepts(properties[name], body[name]) for name in properties)
    allowed = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return body in allowed if allowed is not None else schema["type"] != "string" or isinstance(body, str)


def test_every_route_is_in_it() -> None:
    """But for second names, for HEAD, and for what is always refused."""
    hidden = {
        ("post", "/v2/rerank"), ("post", "/rerank"), ("post", "/v1/reranking"), ("post", "/completions"),
        ("get", "/health"), ("head", "/"), ("head", "/api/version"), ("head", "/api/tags"), ("head", "/api/ps"),
        ("post", "/lora-adapters"), ("post", "/api/{order}"), ("delete", "/api/{order}"),
    }  # fmt: skip
    routes = {
        (method.lower(), re.sub(r":\w+}", "}", route.path)) for route in routes_in(APP) for method in route.methods
    }
    assert routes - hidden == {(method, path) for path, method in OPERATIONS}
    assert hidden <= routes


def routes_in(part: Any) -> Iterator[APIRoute]:
    """FastAPI keeps included routers as they are."""
    for route in part.routes:
        if isinstance(route, APIRoute):
            yield route
        elif hasattr(route, "original_router"):
            yield from routes_in(route.original_router)


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return found
