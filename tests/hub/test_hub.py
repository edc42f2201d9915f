"""Models of a repository on a hub, before anything is fetched: which there are, and what they would cost."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from stand_in import Hub, serving
from typer.testing import CliRunner

from actors.hub import BLOCK_BYTES, FileFarAway, Repository, quantization_of
from arriero.api import Status
from arriero.cli.described import cluster_of
from arriero.cli.main import app
from arriero.example_models import EXAMPLES, Dimensions, write_example_model
from scheduler.costs.shape import read_shape
from scheduler.errors import ArrieroError, InvalidGGUF, Rejected, Unavailable
from scheduler.units import GIB

pytest.importorskip("huggingface_hub")

SMALL, LARGE = Dimensions(8, 1024, 8, 4, 2816, 4096), EXAMPLES["chat-8b"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants

    folder = tmp_path / "cria-GGUF"
    (folder / "split").mkdir(parents=True)
    write_example_model(folder / "cria-Q4_K_M.gguf", "cria", SMALL)
    write_example_model(folder / "cria-Q8_0.gguf", "cria", LARGE)
    (folder / "mmproj-F16.gguf").write_bytes(b"a projector")
    (folder / "README.md").write_text("Q5_K_M.gguf")
    (folder / "split" / "cria-BF16-00001-of-00002.gguf").write_bytes(b"1")
    (folder / "cria-IQ2_XS.gguf").write_bytes(b"no model")
    found = Hub({"herd/cria-GGUF": folder})
    with serving(found) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield found


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_repository_lists_its_models_and_what_they_lack(hub: Hub) -> None:
    models = Repository("hf:herd/cria-GGUF").models
    assert [(model.quantization, model.paths[0]) for model in models] == [
        ("BF16", "split/cria-BF16-00001-of-00002.gguf"),
        ("IQ2_XS", "cria-IQ2_XS.gguf"),
        ("Q4_K_M", "cria-Q4_K_M.gguf"),
        ("Q8_0", "cria-Q8_0.gguf"),
    ]
    assert models[0].missing == ("split/cria-BF16-00002-of-00002.gguf",)
    assert models[2].file_bytes == (hub.repos["herd/cria-GGUF"] / "cria-Q4_K_M.gguf").stat().st_size


@pytest.mark.parametrize(
    ("reference", "file"),
    [
        ("hf:herd/cria-GGUF", "cria-Q4_K_M.gguf"),
        ("hf:herd/cria-GGUF:q8_0", "cria-Q8_0.gguf"),
        ("hf:herd/cria-GGUF@main:Q8_0", "cria-Q8_0.gguf"),
        ("hf:herd/cria-GGUF/cria-IQ2_XS.gguf", "cria-IQ2_XS.gguf"),
    ],
)
def test_a_reference_names_one_of_them(hub: Hub, reference: str, file: str) -> None:
    assert Repository(reference).chosen().paths == (file,)


def test_a_header_far_away_is_that_of_the_file(hub: Hub) -> None:
    """Of 5 GB some MiB are read."""
    repository, file = Repository("hf:herd/cria-GGUF:Q8_0"), hub.repos["herd/cria-GGUF"] / "cria-Q8_0.gguf"
    far, near = repository.read_shape(repository.chosen()), read_shape(file)
    assert far.fingerprint == near.fingerprint and far.weights_bytes == near.weights_bytes > 4 * 10**9
    assert far.file_bytes == near.file_bytes and far.paths == ("hf:herd/cria-GGUF/cria-Q8_0.gguf",)
    assert hub.sent_bytes < 2 * BLOCK_BYTES


def test_what_is_far_away_reads_as_what_is_near(hub: Hub, tmp_path: Path) -> None:
    content = os.urandom(2 * BLOCK_BYTES + 1000)
    (hub.repos["herd/cria-GGUF"] / "noise").write_bytes(content)
    with FileFarAway(f"{os.environ['HF_ENDPOINT']}/herd/cria-GGUF/resolve/main/noise") as file:
        assert file.size_bytes == len(content)
        for at, size in ((0, 10), (10, 10), (BLOCK_BYTES - 5, 5), (BLOCK_BYTES, 7), (2 * BLOCK_BYTES, 9), (3, 4)):
            file.seek(at)
            assert file.read(size) == content[at : at + size]
        file.seek(BLOCK_BYTES - 5)
        assert 0 < len(there := file.read(10)) < 10, "as a pipe: what is there"
        assert content[BLOCK_BYTES - 5 :].startswith(there)
        file.seek(len(content))
        assert file.read(10) == b""


@pytest.mark.parametrize(
    ("reference", "kind", "message"),
    [
        ("hf:herd", Rejected, "names no model on a hub: write hf:org/repo:Q4_K_M"),
        (
            "hf:herd/cria-GGUF:Q6_K",
            Rejected,
            "there is no hf:herd/cria-GGUF:Q6_K; herd/cria-GGUF has BF16, IQ2_XS, Q4_K_M",
        ),
        ("hf:herd/cria-GGUF:BF16", Rejected, "the repository lacks split/cria-BF16-00002-of-00002.gguf"),
        ("hf:herd/cria-GGUF:IQ2_XS", InvalidGGUF, "this is not a GGUF file"),
        ("hf:herd/none:Q8_0", Rejected, "hf:herd/none:Q8_0: no such repository, or it is private"),
        ("hf:herd/mine:Q8_0", Rejected, "hf:herd/mine:Q8_0: no such repository, or it is private"),
        ("hf:herd/gated:Q8_0", Rejected, "hf:herd/gated:Q8_0 is gated: accept its terms"),
        ("hf:herd/ill:Q8_0", Unavailable, "cannot be read from http://127.0.0.1"),
        ("hf:herd/cria-GGUF@v2:Q8_0", Rejected, "the repository has no such revision"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(hub: Hub, reference: str, kind: type[ArrieroError], message: str) -> None:
    hub.codes = {"herd/gated": (403, "GatedRepo"), "herd/ill": (418, ""), "herd/mine": (404, "RepoNotFound")}
    with pytest.raises(kind) as found:
        run("inspect", reference)
    assert message in found.value.message and "\n" not in found.value.message


def test_two_files_of_one_quantisation_are_told_apart(hub: Hub) -> None:
    write_example_model(hub.repos["herd/cria-GGUF"] / "vicuna-Q8_0.gguf", "vicuna", SMALL)
    with pytest.raises(Rejected) as found:
        Repository("hf:herd/cria-GGUF:Q8_0").chosen()
    there = "hf:herd/cria-GGUF/vicuna-Q8_0.gguf, hf:herd/cria-GGUF/cria-Q8_0.gguf"
    assert found.value.message.endswith(f"name one: {there}")


def test_a_hub_that_would_send_a_whole_file_is_not_heard_out(hub: Hub) -> None:
    hub.ranges = False
    with pytest.raises(Unavailable, match="does not give parts of a file"):
        run("inspect", "hf:herd/cria-GGUF:Q4_K_M")


def test_a_token_is_shown_to_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run("inspect", "hf:herd/cria-GGUF:Q4_K_M")
    assert "Bearer hf_secret" in hub.tokens


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text("nodes: [{name: box, ram: 4GiB, gpus: [{name: RTX 3060, total: 6GiB}]}]")
    return path


def test_a_plan_and_a_bill_are_those_of_the_file(hub: Hub, cluster: Path) -> None:
    file = hub.repos["herd/cria-GGUF"] / "cria-Q4_K_M.gguf"
    for verb, *options in (("plan", "--cluster", cluster), ("footprint",)):
        far, near = (json.loads(run(verb, name, *options, "--json")) for name in ("hf:herd/cria-GGUF:Q4_K_M", file))
        assert far == near


def test_advice_says_of_each_quantisation_whether_it_fits(hub: Hub, cluster: Path) -> None:
    advice = json.loads(run("advise", "hf:herd/cria-GGUF", "--cluster", cluster, "--json"))
    assert [each["quantization"] for each in advice] == ["BF16", "IQ2_XS", "Q4_K_M", "Q8_0"]
    assert "lacks" in advice[0]["error"] and "not a GGUF file" in advice[1]["error"]
    assert advice[2]["placement"]["tier"] == "one GPU" and advice[2]["placement"]["n_ctx"] == 32768
    assert 0 < advice[3]["placement"]["n_ctx"] < 32768 and advice[3]["tokens_per_s"] > 1
    text = run("advise", "hf:herd/cria-GGUF", "--cluster", cluster, "--n-ctx", 32768)
    assert "Q8_0" in text and "box gpu0: 9" in text and "nothing was fetched" in text


def test_advice_is_about_a_repository(hub: Hub, cluster: Path) -> None:
    with pytest.raises(Rejected, match="for one model there is arriero plan"):
        run("advise", "hf:herd/cria-GGUF:Q8_0", "--cluster", cluster)


@pytest.mark.parametrize(
    ("path", "quantization"),
    [
        ("Qwen3-8B-Q4_K_M.gguf", "Q4_K_M"),
        ("Q4_K_XL/x-UD-Q4_K_XL-00001-of-00003.gguf", "UD-Q4_K_XL"),
        ("gemma-3-4b-it-q4_0.gguf", "Q4_0"),
        ("model.f16.gguf", "F16"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("Qwen2.5-VL.gguf", ""),
    ],
)
def test_names_say_the_quantisation(path: str, quantization: str) -> None:
    assert quantization_of(path) == quantization


def test_the_cluster_of_a_service_is_what_others_leave_of_it() -> None:
    node = {"node_id": "n", "hostname": "box", "address": "", "physical_cores": 4, "state": "alive"}
    ram = {"memory_total_bytes": 64 * GIB, "memory_available_bytes": 40 * GIB, "memory_reserved_bytes": 8 * GIB}
    gpu = {"node_id": "n", "product": "RTX 3090", "kind": "cuda", "total_bytes": 24 * GIB, "free_bytes": 2 * GIB}
    gpu |= {"used_bytes": 22 * GIB, "booked_bytes": 20 * GIB, "foreign_bytes": 2 * GIB}
    status = Status.model_validate(
        {
            "nodes": [node | ram],
            "gpus": [
                gpu | {"device_id": "n/gpu0", "label": "gpu0", "state": "ok"},
                gpu | {"device_id": "n/gpu1", "label": "gpu1", "state": "lost"},
            ],
            "version": "1",
            "uptime_s": 1.0,
            "mode": "pool",
        }
    )
    described = cluster_of(status)
    (found,) = described.cluster.nodes
    assert (found.name, found.cores, found.ram, found.ram_free) == ("box", 4, 64 * GIB, 48 * GIB)
    assert [(each.name, each.total_bytes, each.free) for each in found.gpus] == [("RTX 3090", 24 * GIB, 22 * GIB)]
    twins = [each.model_copy(update={"node_id": name * 12}) for name, each in zip("ab", status.nodes * 2, strict=True)]
    named = cluster_of(status.model_copy(update={"nodes": twins})).cluster.nodes
    assert [each.name for each in named] == ["box aaaaaaaa", "box bbbbbbbb"]
    with pytest.raises(Unavailable):
        cluster_of(status.model_copy(update={"nodes": []}))
