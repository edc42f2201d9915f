"""What one client sends must not reach the others, on a real Ray with real loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from service import Listener, Reference, Service, private_ray, works

pytestmark = [pytest.mark.ray, pytest.mark.llama, pytest.mark.slow]

SCHEMAS: list[dict[str, Any]] = [
    {"type": "string", "maxLength": 20000},
    {"type": "string", "pattern": "^x" + "(" * 24 + "a?" + "){2}" * 24 + "$"},
    {"anyOf": [{"type": "string", "maxLength": 50 + number} for number in range(500)]},
]


@pytest.fixture(scope="module")
def service(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("suicidal")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "costs"))
        from gguf_shapes import SMALL, write_model

        # Every layer slides, and llama.cpp computes with a cache that it has not made.
        write_model(replace(SMALL["gemma-embedding"], n_layer=4), folder / "suicidal.gguf")
    settings = {"model_paths": [str(models), str(folder)], "defaults": {"n_ctx": 8192, "n_seq_max": 2}}
    with private_ray(), Service(models, virtual_gpus=["84MiB", "36MiB"], **settings) as service:
        yield service


def chat(service: Service, **more: Any) -> httpx.Response:
    body = {"model": "alba", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 40, **more}
    return httpx.post(f"{service.deployment.url}/v1/chat/completions", json=body, timeout=120)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_schema_harms_nobody_else(schema: dict[str, Any], service: Service, reference: Reference) -> None:
    beside = Listener(service, "alba")
    seq = service.last_seq()
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    reply = chat(service, response_format=wanted)
    assert reply.status_code in (200, 400), reply.text
    assert reply.status_code == 200 or "schema" in reply.json()["error"]["message"]
    beside.end()
    assert beside.error is None
    assert not service.notices("replica_died", after=seq)
    assert works(service, reference, "alba")


def test_a_prompt_of_many_megabytes_is_refused_by_its_size(service: Service) -> None:
    reply = httpx.post(
        f"{service.deployment.url}/v1/completions", json={"model": "alba", "prompt": "x " * 14_000_000}, timeout=120
    )
    assert reply.status_code == 400 and "the slot holds" in reply.json()["error"]["message"]


def test_a_model_that_ends_its_process_says_what_it_ended_of(service: Service) -> None:
    body = {"model": "suicidal", "input": "x"}
    reply = httpx.post(f"{service.deployment.url}/v1/embeddings", json=body, timeout=120)
    assert reply.status_code == 503
    assert "GGML_ASSERT(buffer) failed" in reply.json()["error"]["message"]
