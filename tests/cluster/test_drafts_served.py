"""Drafts from the catalogue to the answer: a real service, a virtual GPU, llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from service import Service, private_ray

from arriero.api import Rejected
from arriero.sample_models import write_sample_model

pytestmark = [pytest.mark.ray, pytest.mark.llama, pytest.mark.slow]

SIZES = {"n_layer": 4, "n_embd": 128, "n_ff": 256, "n_ff_expert": 128}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("models")
    write_sample_model(folder / "main.gguf", "llama", **SIZES)
    write_sample_model(folder / "draft.gguf", "llama", **{**SIZES, "n_layer": 1})
    write_sample_model(folder / "layers.gguf", "glm4moe", n_nextn=1, **SIZES)
    write_sample_model(folder / "state.gguf", "mamba", **SIZES)
    common = {"n_ctx": 1024, "n_seq_max": 1}
    models = {
        "plain": {"path": "main.gguf", **common},
        "drafted": {"path": "main.gguf", "model_draft": "draft.gguf", **common},
        "layered": {"path": "layers.gguf", **common},
        "predicted": {"path": "layers.gguf", "spec_type": "draft-mtp", **common},
        "unfit": {"path": "main.gguf", "model_draft": "state.gguf"},
        "forgetful": {"path": "state.gguf", "model_draft": "draft.gguf"},
    }
    with private_ray(), Service(folder, models=models, virtual_gpus=["256MiB"]) as running:
        yield running
        running.unload_all()


def say(service: Service, model: str) -> dict[str, Any]:
    body = {"model": model, "prompt": "Where do the llamas go? " * 4, "max_tokens": 120, "temperature": 0}
    reply = httpx.post(f"{service.deployment.url}/v1/completions", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


@pytest.mark.parametrize(("with_it", "without"), [("drafted", "plain"), ("predicted", "layered")])
def test_a_draft_is_planned_loaded_and_booked_and_changes_no_answer(
    service: Service, with_it: str, without: str
) -> None:
    plain = say(service, without)  # by now all headers are read
    plan = service.client.plan(with_it)
    assert plan.draft is not None and plan.draft.bytes["gpu0"] > 0
    guessed = say(service, with_it)
    assert guessed["choices"][0]["text"] == plain["choices"][0]["text"]
    assert guessed["timings"]["draft_n"] >= guessed["timings"]["draft_n_accepted"] > 0
    assert not plain["timings"].get("draft_n")
    booked = {replica.model: sum(share.bytes for share in replica.layout[:-1]) for replica in service.replicas()}
    assert booked[with_it] > booked[without]
    assert not service.notices("footprint_exceeded")


def test_drafts_that_cannot_be_are_refused_with_the_way_out(service: Service) -> None:
    found = {model.name: model for model in service.client.models()}
    assert found["drafted"].draft.endswith("draft.gguf") and found["predicted"].draft.endswith("layers.gguf")
    assert "recurrent state: it cannot drop rejected tokens; name a smaller model" in found["unfit"].reason
    with pytest.raises(Rejected, match=r"forgetful has a recurrent state, .*Leave out model_draft"):
        service.complete("forgetful", "p")
