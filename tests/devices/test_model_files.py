"""Model files are found, put together from their parts, and asked for their share of the page cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from actors.devices import files
from actors.devices.files import cached_fraction, find_models, parts_of
from scheduler.units import GIB, MIB


def put(folder: Path, *names: str, size: int = 10) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"G" * size)


def names(folder: Path, *model_paths: str) -> list[str]:
    return [str(Path(model.path).relative_to(folder)) for model in find_models(model_paths or (str(folder),))]


def test_folders_are_searched_through_and_through(tmp_path: Path) -> None:
    put(tmp_path, "b.gguf", "a/deep/er.gguf", "notes.txt", "a/half.gguf.part", ".hidden/x.gguf", "._b.gguf")
    assert names(tmp_path) == ["b.gguf", "a/deep/er.gguf"]


def test_a_name_that_is_not_utf_8_cannot_be_told_to_anybody(tmp_path: Path) -> None:
    put(tmp_path, "a.gguf", os.fsdecode(b"bad\xff.gguf"))
    assert [Path(model.path).name for model in find_models([str(tmp_path)])] == ["a.gguf"]


def test_projectors_are_listed_too(tmp_path: Path) -> None:
    put(tmp_path, "mmproj-llava-f16.gguf", "llava.gguf")
    assert names(tmp_path) == ["llava.gguf", "mmproj-llava-f16.gguf"]


def test_a_pipe_is_no_model_and_is_not_waited_for(tmp_path: Path) -> None:
    put(tmp_path, "a.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "folder.gguf").mkdir()
    assert names(tmp_path) == ["a.gguf"]
    assert names(tmp_path, str(tmp_path / "pipe.gguf")) == []
    assert cached_fraction(tmp_path / "pipe.gguf") in (None, 0.0)


def test_parts_make_one_model_named_by_the_first(tmp_path: Path) -> None:
    parts = [f"big-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    put(tmp_path, *parts, size=100)
    os.utime(tmp_path / parts[1], (5e9, 5e9))
    (model,) = find_models([str(tmp_path)])
    assert model.path == str(tmp_path / parts[0])
    assert model.paths == tuple(str(tmp_path / part) for part in parts)
    assert model.size_bytes == 300
    assert model.modified_at_s == 5e9


def test_a_model_with_a_part_missing_is_not_there_yet(tmp_path: Path) -> None:
    put(tmp_path, "big-00001-of-00003.gguf", "big-00003-of-00003.gguf")
    assert names(tmp_path) == []


def test_a_file_a_glob_and_a_folder_name_the_same_model_once(tmp_path: Path) -> None:
    put(tmp_path, "a.gguf", "sub/b.gguf")
    (tmp_path / "again.gguf").symlink_to(tmp_path / "a.gguf")
    found = names(tmp_path, str(tmp_path / "a.gguf"), str(tmp_path / "**/*.gguf"), str(tmp_path))
    assert found == ["a.gguf", "sub/b.gguf"]


def test_brackets_in_a_name_are_taken_as_they_stand(tmp_path: Path) -> None:
    put(tmp_path, "[tuned] a.gguf")
    assert names(tmp_path, str(tmp_path / "[tuned] a.gguf")) == ["[tuned] a.gguf"]


def test_links_that_go_in_circles_end(tmp_path: Path) -> None:
    put(tmp_path, "sub/a.gguf")
    (tmp_path / "sub/round").symlink_to(tmp_path)
    assert names(tmp_path) == ["sub/a.gguf"]


def test_what_is_not_there_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").symlink_to(tmp_path / "nowhere")
    assert names(tmp_path, str(tmp_path), str(tmp_path / "missing")) == []


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "models/a.gguf")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names(tmp_path, "~/models") == ["models/a.gguf"]


def test_parts_of_a_single_file_is_itself() -> None:
    assert parts_of(Path("/m/a.gguf")) == (Path("/m/a.gguf"),)


def test_what_was_just_written_is_cached_and_what_was_dropped_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    put(tmp_path, "a.gguf", size=2 * MIB + 1)
    assert cached_fraction(path) == 1.0
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    dropped = cached_fraction(path)
    if dropped == 1.0:
        pytest.skip("this file system keeps its pages in memory")
    assert dropped == 0.0


def test_a_big_file_is_probed_in_windows(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with path.open("wb") as file:
        file.truncate(8 * GIB)
        for window in (0, 1, 40):
            file.seek(window * 128 * MIB)
            file.write(b"G" * MIB)
    assert cached_fraction(path) == 3 / 64


def test_an_empty_or_missing_file_has_no_share(tmp_path: Path) -> None:
    put(tmp_path, "empty.gguf", size=0)
    assert cached_fraction(tmp_path / "empty.gguf") == 0.0
    assert cached_fraction(tmp_path / "missing.gguf") is None


def test_the_share_of_a_model_weighs_its_parts_by_size(tmp_path: Path) -> None:
    put(tmp_path, "a-00001-of-00002.gguf", size=MIB)
    put(tmp_path, "a-00002-of-00002.gguf", size=3 * MIB)
    assert find_models([str(tmp_path)])[0].cached_fraction == 1.0


def test_a_file_that_claims_to_be_the_first_of_none_hides_no_others(tmp_path: Path) -> None:
    (tmp_path / "x-00001-of-00000.gguf").touch()
    (tmp_path / "good.gguf").write_bytes(b"GGUF")
    assert {Path(model.path).name for model in find_models([str(tmp_path)])} == {"good.gguf", "x-00001-of-00000.gguf"}


def test_files_that_go_while_they_are_looked_at_hide_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    look = files._model

    def looks_and_goes(path: Path) -> Any:
        model = look(path)
        if path.stem == "b":
            path.unlink()
        return model

    monkeypatch.setattr(files, "_model", looks_and_goes)
    assert [Path(model.path).stem for model in find_models([str(tmp_path)])] == ["a", "c"]
