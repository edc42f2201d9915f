"""Adapters from the catalogue to the answer: a real service, a virtual GPU, llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from service import Service, private_ray, write_llama

from arriero.api import Rejected
from arriero.sample_adapters import write_sample_adapter

pytestmark = [pytest.mark.ray, pytest.mark.llama, pytest.mark.slow]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder, other = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("lora")
    alba = write_llama(folder / "alba.gguf", seed=1)
    write_sample_adapter(folder / "fun.gguf", alba, seed=2, strength=2.0)
    write_sample_adapter(other / "terse.gguf", alba, seed=3, strength=2.0)
    write_llama(folder / "bruma.gguf", seed=2)
    models = {
        "alba": {
            "path": "alba.gguf",
            "adapters": {"fun": "fun.gguf", "terse": {"path": str(other / "terse.gguf"), "scale": 0}},
        },
        "plain": {"path": "alba.gguf"},
        "broken": {"path": "bruma.gguf", "adapters": {"it": "alba.gguf", "gone": "gone.gguf"}},
    }
    with private_ray(), Service(folder, models=models, virtual_gpus=["64MiB"]) as running:
        yield running
        running.unload_all()


def say(service: Service, model: str, **more: object) -> str:
    body = {"model": model, "prompt": "Where do", "max_tokens": 12, "temperature": 0, **more}
    reply = httpx.post(f"{service.deployment.url}/v1/completions", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def test_requests_choose_the_adapters_of_a_model(service: Service) -> None:
    plain, fun = say(service, "plain"), say(service, "alba")
    assert plain != fun
    assert say(service, "alba", lora=[{"id": 0, "scale": 0}]) == plain
    assert say(service, "alba", lora=[{"name": "fun", "scale": 1}]) == fun
    assert say(service, "alba", lora=[{"id": 1, "scale": 1}]) not in (plain, fun)
    body = {"model": "alba", "prompt": "p", "lora": [{"name": "sad", "scale": 1}]}
    reply = httpx.post(f"{service.deployment.url}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 400 and "it has 0 (fun), 1 (terse)" in reply.json()["error"]["message"]


def test_adapters_are_booked_as_predicted(service: Service) -> None:
    say(service, "alba")
    say(service, "plain")
    (gpu,) = service.client.status().gpus
    booked = {replica.model: sum(share.bytes for share in replica.layout[:-1]) for replica in service.replicas()}
    assert booked["alba"] > booked["plain"]
    assert gpu.used_bytes <= gpu.booked_bytes
    assert not service.notices("footprint_exceeded")
    (ready,) = [each for each in service.notices("replica_ready") if each.model == "alba"][:1]
    ((predicted, measured),) = ready.data["buffers"].values()
    assert measured == pytest.approx(predicted, abs=64 * 1024)


def test_the_catalogue_tells_what_comes_with_a_model(service: Service, tmp_path: Path) -> None:
    found = {model.name: model for model in service.client.models()}
    assert set(found) == {"alba", "plain", "broken"}  # adapters are no models
    assert [(each.name, each.scale) for each in found["alba"].adapters] == [("fun", 1.0), ("terse", 0.0)]
    assert found["broken"].state == "invalid" and "adapter gone: no file gone.gguf" in found["broken"].reason
    with pytest.raises(Rejected, match=r"gone\.gguf"):
        service.complete("broken", "p")
