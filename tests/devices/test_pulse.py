"""What a process promises is what its node reads, and nothing is left of processes that are gone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from beside import Program

from actors.devices.processes import this_process
from actors.devices.pulse import promises, sign_in

OTHER = """
import sys
from pathlib import Path
from actors.devices.pulse import sign_in
pulse = sign_in("n1", "RunnerActor", "a decode", folder=Path(sys.argv[1]))
pulse.promise(7.0, 0.5)
print("signed in", flush=True)
sys.stdin.read()
"""


def test_a_promise_is_read_as_it_was_made_and_taken_back(tmp_path: Path) -> None:
    pulse = sign_in("n1", "RunnerActor", "a decode", folder=tmp_path / "pulse")
    before = time.monotonic()
    pulse.promise(30.0, usual_s=1.5)
    (promise,) = promises("n1", folder=tmp_path / "pulse")
    assert (promise.pid, promise.started_at_s) == this_process().identity
    assert (promise.title, promise.what, promise.allowed_s, promise.usual_s) == ("RunnerActor", "a decode", 30.0, 1.5)
    assert before + 30.0 <= promise.due_at <= time.monotonic() + 30.0
    pulse.rest()
    (promise,) = promises("n1", folder=tmp_path / "pulse")
    assert promise.due_at == 0.0


def test_every_line_of_work_has_its_own_and_every_node_sees_its_own(tmp_path: Path) -> None:
    for node_id, title, what in (
        ("n1", "RunnerActor", "x"),
        ("n1", "RunnerActor", "y"),
        ("n2", "GpuActor", "a reading"),
    ):
        sign_in(node_id, title, what, folder=tmp_path)
    assert sorted(promise.what for promise in promises("n1", folder=tmp_path)) == ["x", "y"]
    assert [promise.title for promise in promises("n2", folder=tmp_path)] == ["GpuActor"]


def test_who_is_gone_leaves_no_file(tmp_path: Path, beside: Callable[..., Program]) -> None:
    other = beside(OTHER, tmp_path)
    other.line()
    (promise,) = promises("n1", folder=tmp_path)
    assert (promise.pid, promise.allowed_s) == (other.process.pid, 7.0)
    other.end()
    assert list(promises("n2", folder=tmp_path)) == []  # another node of this machine looks, and tidies up
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_pulse_is_passed_over(tmp_path: Path) -> None:
    sign_in("n1", "RunnerActor", "a decode", folder=tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    for bad in (b"", content[:-1], b"x" * len(content)):
        file.write_bytes(bad)
        assert list(promises("n1", folder=tmp_path)) == []
        assert file.exists()


def test_those_of_another_container_are_let_be(tmp_path: Path, beside: Callable[..., Program]) -> None:
    other = beside(OTHER, tmp_path)
    other.line()
    other.end()
    (file,) = tmp_path.iterdir()
    elsewhere = file.rename(tmp_path / f"1{file.name}")  # its pid means nothing here
    assert list(promises("n1", folder=tmp_path)) == []
    assert elsewhere.exists()


def test_a_folder_that_others_can_write_to_is_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "open"
    kept = sign_in("n1", "RunnerActor", "a decode", folder=folder)
    folder.chmod(0o777)
    assert list(promises("n1", folder=folder)) == []
    sign_in("n1", "GpuActor", "a reading", folder=folder).promise(1.0)  # unwatched, but at work
    assert "other users can write" in caplog.text
    assert len(list(folder.iterdir())) == 1
    (tmp_path / "link").symlink_to(tmp_path)
    assert list(promises("n1", folder=tmp_path / "link")) == []
    kept.rest()


def test_only_the_user_can_enter_the_folder(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        sign_in("n1", "RunnerActor", "a decode", folder=tmp_path / "pulse")
    finally:
        os.umask(mask)
    assert (tmp_path / "pulse").stat().st_mode & 0o777 == 0o700
    assert [file.stat().st_mode & 0o777 for file in (tmp_path / "pulse").iterdir()] == [0o600]
