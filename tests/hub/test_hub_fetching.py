"""Fetching models from a hub: whole, continued, checked, and never a half file that looks whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from stand_in import Hub, serving
from typer.testing import CliRunner

from actors import hub as hub_module
from actors import hub_fetching
from actors.devices.files import find_models
from actors.hub import Repository
from actors.hub_fetching import fetch, files_of
from arriero.cli.main import app
from scheduler.errors import Rejected, Unavailable
from scheduler.units import MIB

SIZE = 3 * MIB
PARTS = ("parts/cria-Q8_0-00001-of-00002.gguf", "parts/cria-Q8_0-00002-of-00002.gguf")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants

    folder = tmp_path / "there"
    (folder / "parts").mkdir(parents=True)
    for name in ("cria-Q4_K_M.gguf", "mmproj-cria-F16.gguf", "mmproj-cria-F32.gguf", *PARTS):
        (folder / name).write_bytes(os.urandom(SIZE))
    found = Hub({"herd/cria": folder})
    with serving(found) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield found


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


def fetched(reference: str, models: Path, told: list[int] | None = None) -> list[Path]:
    repository = Repository(reference)
    counts = told if told is not None else []
    return fetch(repository, files_of(repository, repository.chosen()), models, counts.append)


def same(hub: Hub, found: list[Path], models: Path) -> bool:
    there = hub.repos["herd/cria"]
    return all(path.read_bytes() == (there / path.relative_to(models / "herd/cria")).read_bytes() for path in found)


def test_a_model_comes_with_its_parts_and_its_projector(hub: Hub, models: Path) -> None:
    told: list[int] = []
    found = fetched("hf:herd/cria:Q8_0", models, told)
    assert [str(path.relative_to(models)) for path in found] == [
        *(f"herd/cria/{part}" for part in PARTS),
        "herd/cria/mmproj-cria-F16.gguf",
    ]
    assert same(hub, found, models)
    assert told == sorted(told) and told[-1] == 3 * SIZE
    listed = {Path(model.path).name for model in find_models([str(models)])}
    assert listed == {Path(PARTS[0]).name, "mmproj-cria-F16.gguf"}


def test_what_is_there_is_not_fetched_again(hub: Hub, models: Path) -> None:
    fetched("hf:herd/cria", models)
    before = hub.sent_bytes
    told: list[int] = []
    assert same(hub, fetched("hf:herd/cria", models, told), models)
    assert hub.sent_bytes < before + SIZE and told[-1] == 2 * SIZE


def test_a_half_file_is_no_model_and_is_continued(hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 65536)
    hub.cuts_at = SIZE // 3
    with pytest.raises(Unavailable):
        fetched("hf:herd/cria", models)
    assert find_models([str(models)]) == ()
    half = sum(part.stat().st_size for part in models.rglob("*.part"))
    assert 0 < half < SIZE
    hub.cuts_at, before = 0, hub.sent_bytes
    assert same(hub, fetched("hf:herd/cria", models), models)
    assert hub.sent_bytes - before < 2 * SIZE - half + MIB


def test_a_file_that_huggingface_hub_would_not_begin(hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes none above 50 GB over plain HTTP, but it continues them."""
    monkeypatch.setattr("huggingface_hub.constants.MAX_HTTP_DOWNLOAD_SIZE", MIB)
    for module in (hub_module, hub_fetching):
        monkeypatch.setattr(module, "BLOCK_BYTES", 65536)
    assert same(hub, fetched("hf:herd/cria", models), models)


def test_two_who_fetch_the_same_model_fetch_it_once(hub: Hub, models: Path) -> None:
    with ThreadPoolExecutor() as threads:
        both = [threads.submit(fetched, "hf:herd/cria", models) for _ in range(2)]
    assert all(same(hub, each.result(), models) for each in both)
    assert hub.sent_bytes < 2 * SIZE + MIB


def test_what_arrived_damaged_is_deleted(hub: Hub, models: Path) -> None:
    hub.wrong.add("cria-Q4_K_M.gguf")
    with pytest.raises(Unavailable, match="arrived damaged"):
        fetched("hf:herd/cria", models)
    assert find_models([str(models)]) == ()


def test_a_disk_without_room_is_refused_with_numbers(hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_fetching, "LEFT_BYTES", 1 << 60)
    with pytest.raises(Rejected, match=r"needs 6\.0 MiB on the disk of .* are free and .* must stay free"):
        fetched("hf:herd/cria", models)


def test_a_folder_that_cannot_be_is_refused(hub: Hub, models: Path) -> None:
    models.write_bytes(b"")
    with pytest.raises(Rejected, match="cannot be written: Not a directory"):
        fetched("hf:herd/cria", models)


def test_what_the_disk_refuses_is_not_the_hub_s_fault(hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: object, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full(hub_fetching._Written):
        def __init__(self, file: object) -> None:
            super().__init__(SimpleNamespace(write=partial(full, file), tell=lambda: 0))  # type: ignore[arg-type]

    monkeypatch.setattr(hub_fetching, "_Written", Full)
    with pytest.raises(Rejected, match="cannot be written: No space left on device"):
        fetched("hf:herd/cria", models)


def test_a_hub_that_names_files_outside_of_the_repository_is_not_followed(hub: Hub, models: Path) -> None:
    hub.also = ("../outside-Q2_K.gguf", "/abs-Q2_K.gguf", "a//b-Q2_K.gguf")
    assert {model.quantization for model in Repository("hf:herd/cria").models} == {"Q4_K_M", "Q8_0"}


def test_pull_says_where_the_files_are(hub: Hub, models: Path) -> None:
    done = CliRunner().invoke(
        app, ["pull", "hf:herd/cria", "--to", str(models), "--no-projector"], catch_exceptions=False
    )
    assert done.exit_code == 0 and done.output.split() == [str(models / "herd/cria/cria-Q4_K_M.gguf")]
    assert same(hub, [models / "herd/cria/cria-Q4_K_M.gguf"], models)
