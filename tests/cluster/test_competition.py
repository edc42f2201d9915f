"""More models than memory, over HTTP, on two unequal virtual GPUs: placements, evictions, refusals, the right texts."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from service import Reference, Service, eventually, private_ray, write_huge

from arriero.api import Impossible, InvalidGGUF, Rejected, UnknownModel
from arriero.sample_models import write_sample_model

pytestmark = [pytest.mark.ray, pytest.mark.llama, pytest.mark.slow]

# A small llama takes 19.3 MiB, duna 21.4, yunta 43.4: gpu0 holds two small ones or yunta, gpu1 holds one.
GPUS = ["44MiB", "24MiB"]
SMALL = ("alba", "bruma", "cumbre")


@pytest.fixture(scope="module")
def service(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    hostile = tmp_path_factory.mktemp("hostile")
    (hostile / "roto.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 64)
    whole = (models / "alba.gguf").read_bytes()
    (hostile / "cortado.gguf").write_bytes(whole[: len(whole) // 2])
    (hostile / "extrana.gguf").write_bytes(whole.replace(b"blk.3.attn_q.weight", b"blk.3.attn_x.weight"))
    write_huge(hostile / "inmenso.gguf", 1 << 40)
    with private_ray():
        paths = [str(models), str(hostile)]
        with Service(models, virtual_gpus=GPUS, model_paths=paths, policy={"min_residency_s": 0}) as service:
            yield service


def where(service: Service, model: str) -> dict[str, int]:
    """Layers per device, devices without any left out."""
    return {share.device: share.layers for share in service.replica(model).layout if share.layers}


def test_the_least_recently_used_model_makes_room(service: Service, reference: Reference) -> None:
    def ask(model: str) -> None:
        ((prompt, answer),) = reference.questions(service.path(model))
        assert service.complete(model, prompt) == answer

    for model in SMALL:
        ask(model)
    assert [where(service, model) for model in SMALL] == [{"gpu1": 7}, {"gpu0": 7}, {"gpu0": 7}]  # the tightest fit
    seq = service.last_seq()
    ask("alba")
    ask("cumbre")
    assert service.last_seq() == seq, "models that are loaded are not loaded again"

    ask("duna")  # bruma has waited longest
    ask("bruma")  # then alba has
    ask("alba")  # then cumbre has
    assert [notice.model for notice in service.notices("replica_evicted", after=seq)] == ["bruma", "alba", "cumbre"]

    seq = service.last_seq()
    ask("yunta")  # needs all of gpu0, and no more
    in_the_way = {notice.model for notice in service.notices("replica_evicted", after=seq)}
    assert where(service, "yunta") == {"gpu0": 19}
    assert {replica.model for replica in service.replicas()} == {"yunta", "alba", "bruma", "duna"} - in_the_way
    assert len(in_the_way) == 2

    gpus = service.client.status().gpus
    assert all(gpu.used_bytes <= gpu.total_bytes for gpu in gpus)
    service.unload_all()


def test_many_clients_of_more_models_than_fit_all_get_their_text(service: Service, reference: Reference) -> None:
    questions = [
        (model, prompt, answer)
        for model in (*SMALL, "duna", "yunta")
        for prompt, answer in reference.questions(service.path(model), 4)
    ]
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(lambda question: service.complete(*question[:2]), questions))
    assert answers == [answer for _, _, answer in questions]
    service.unload_all()


def test_what_can_never_work_is_refused_before_anybody_makes_room(service: Service) -> None:
    for model in SMALL:
        service.client.load(model)
    before = [replica.replica_id for replica in service.replicas()]
    with pytest.raises(InvalidGGUF, match="roto"):
        service.complete("roto", "hola")
    with pytest.raises(InvalidGGUF, match="cortado"):
        service.complete("cortado", "hola")
    with pytest.raises(UnknownModel, match="alba"):
        service.complete("albo", "hola")
    with pytest.raises(Impossible, match=r"inmenso can never fit this cluster.*TiB"):
        service.complete("inmenso", "hola")
    with pytest.raises(Rejected, match="trained for 4096"):
        service.complete("duna", "hola", n_ctx=5000)
    assert service.client.plan("inmenso").verdict == "impossible"
    assert [replica.replica_id for replica in service.replicas()] == before
    service.unload_all()


def test_a_file_that_only_llama_cpp_finds_fault_with_is_tried_once(service: Service) -> None:
    seq = service.last_seq()
    for _ in range(2):
        with pytest.raises(InvalidGGUF, match=r"extrana.*attn_q"):
            service.complete("extrana", "hola")
    assert len(service.notices("load_failed", after=seq)) == 1
    service.await_empty()


def test_a_smaller_context_is_served_by_what_is_loaded_and_a_larger_one_replaces_it(service: Service) -> None:
    service.client.load("alba", n_ctx=512)
    first = service.replica("alba")
    assert first.n_ctx == 1024  # the catalogue's, which holds what was asked for
    service.complete("alba", "hola", n_ctx=300)
    assert service.replica("alba").replica_id == first.replica_id
    service.complete("alba", "hola", n_ctx=2048)
    second = service.replica("alba")
    assert second.n_ctx == 2048
    assert second.replica_id != first.replica_id
    service.unload_all()


def test_files_that_come_and_go_are_noticed(service: Service, models: Path) -> None:
    newcomer = write_sample_model(models / "nueva.gguf", "llama", seed=9, n_layer=2)
    try:
        eventually(lambda: "nueva" in {model.name for model in service.client.models()}, "the new file to be found")
        assert service.complete("nueva", "hola")
        service.unload_all()
    finally:
        newcomer.unlink()
    eventually(lambda: "nueva" not in {model.name for model in service.client.models()}, "the lost file to be noticed")
    with pytest.raises(UnknownModel):
        service.complete("nueva", "hola")
