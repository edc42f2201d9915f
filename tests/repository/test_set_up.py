"""Set-up without waiting for it: a fake interpreter stands in for pip and for the llama_cpp that it installs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import common_build
import environment
import llama_build
import progress
import pytest
from llama_build import CPU, CUDA, Build

ROOT = Path(__file__).resolve().parents[2]

# Notes each call; `pip install` moves to the next of the prepared builds, and the probe finds that one.
FAKE_PYTHON = """#!{python}
import json, pathlib, sys
folder = pathlib.Path(__file__).parent
calls = folder / "calls.json"
done = json.loads(calls.read_text()) if calls.exists() else []
done.append(sys.argv[1:])
calls.write_text(json.dumps(done))
installs = sum(call[:3] == ["-m", "pip", "install"] for call in done)
if sys.argv[1] == "-c":
    print(json.dumps({builds}[installs - 1]))
"""


def fake_python(folder: Path, *builds: dict[str, bool]) -> Path:
    python = folder / "python"
    python.write_text(FAKE_PYTHON.format(python=sys.executable, builds=list(builds)))
    python.chmod(0o755)
    return python


def pip_calls(python: Path, verb: str) -> list[list[str]]:
    calls = json.loads((python.parent / "calls.json").read_text())
    return [call for call in calls if call[:3] == ["-m", "pip", verb]]


def fake_llama(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> Path:
    package = folder / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return package


def test_the_probe_sees_a_build_with_rpc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_llama(tmp_path, monkeypatch, "def llama_supports_rpc(): return True\n")
    build = llama_build.probe(Path(sys.executable))
    assert build == Build(rpc=True, cuda=False)
    assert build.fault(CPU) == ""
    assert "without CUDA" in build.fault(CUDA)


def test_the_probe_sees_a_build_without_rpc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_llama(tmp_path, monkeypatch, "def llama_supports_rpc(): return False\n")
    assert "RPC" in llama_build.probe(Path(sys.executable)).fault(CPU)


def test_the_probe_sees_a_cuda_build_by_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = fake_llama(tmp_path, monkeypatch, "def llama_supports_rpc(): return True\n")
    (package / "lib").mkdir()
    (package / "lib" / "libggml-cuda.so").touch()
    build = llama_build.probe(Path(sys.executable))
    assert build.fault(CUDA) == ""
    assert "with CUDA" in build.fault(CPU)


def test_the_probe_tells_why_a_build_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_llama(tmp_path, monkeypatch, "raise OSError('libgomp.so.1 is not there')\n")
    assert "libgomp.so.1 is not there" in llama_build.probe(Path(sys.executable)).fault(CPU)


def test_a_good_build_is_installed_once_with_the_cache(tmp_path: Path) -> None:
    python = fake_python(tmp_path, {"rpc": True, "cuda": False})
    llama_build.install(python, tmp_path / "llama.txt", CPU, tmp_path / "log")
    (install,) = pip_calls(python, "install")
    assert "--no-cache-dir" not in install
    assert {"--require-hashes", "--no-binary", "--no-build-isolation"} <= set(install)


def test_a_cached_build_without_rpc_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = fake_python(tmp_path, {"rpc": False, "cuda": False}, {"rpc": True, "cuda": False})
    llama_build.install(python, tmp_path / "llama.txt", CPU, tmp_path / "log")
    assert "lacks the RPC backend" in capsys.readouterr().out
    assert len(pip_calls(python, "cache")) == 1
    first, second = pip_calls(python, "install")
    assert "--force-reinstall" in second
    assert second == [*first, "--no-cache-dir"]


def test_a_build_that_stays_wrong_is_an_error_with_its_log(tmp_path: Path) -> None:
    python = fake_python(tmp_path, {"rpc": False, "cuda": False}, {"rpc": False, "cuda": False})
    with pytest.raises(progress.SetupFailed, match="RPC backend") as failure:
        llama_build.install(python, tmp_path / "llama.txt", CPU, tmp_path / "the.log")
    assert "the.log" in str(failure.value)


def test_cuda_without_its_compiler_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(llama_build.shutil, "which", lambda name, path=None: None)
    with pytest.raises(progress.SetupFailed, match="leave out CUDA=1"):
        llama_build.build_environment(tmp_path / "python", CUDA)


def test_the_callers_cmake_arguments_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", "nvcc")
    monkeypatch.setenv("CMAKE_ARGS", "-DCMAKE_CUDA_ARCHITECTURES=86")
    arguments = llama_build.build_environment(tmp_path / "python", CUDA)["CMAKE_ARGS"]
    assert arguments == "-DGGML_RPC=ON -DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=86"


def test_a_failing_command_shows_the_end_of_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log" / "x.log"
    command = ["sh", "-c", "echo first; seq 100; echo boom >&2; exit 3"]
    with pytest.raises(progress.SetupFailed, match="exit status 3") as failure:
        progress.run(command, label="x", log=log, step="never")
    assert str(log) in str(failure.value)
    shown = capsys.readouterr().err
    assert "boom" in shown
    assert "first" not in shown
    assert "first" in log.read_text()


def test_a_long_command_shows_its_newest_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LOG_TICK_S", 0.01)
    go = tmp_path / "go"
    script = f"echo '[1/9] a'; echo '[2/9] b'; while [ ! -e {go} ]; do sleep 0.01; done"

    class Watcher:
        """Standard output that lets the command end once step 2 was shown."""

        def isatty(self) -> bool:
            return False

        def flush(self) -> None:
            pass

        def write(self, text: str) -> None:
            if "[2/9]" in text:
                go.touch()

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Watcher())
        progress.run(["sh", "-c", script], label="x", log=tmp_path / "log", step=r"\[\d+/\d+\]")
    assert go.exists()


def test_no_compiler_is_noticed_before_any_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    with pytest.raises(progress.SetupFailed, match="build-essential"):
        environment.require_compiler()


# ---------------------------------------------------------------------- the chat library


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for llama.cpp's source: its files are there, and empty, so that nothing is compiled for long."""
    folder = tmp_path / "llama.cpp"
    common = folder / "common"
    common.mkdir(parents=True)
    listed = (ROOT / "setup" / "llama_common" / "CMakeLists.txt").read_text()
    for name in re.findall(r"\$\{COMMON\}/([a-z-]+\.cpp)", listed):
        (common / name).touch()
    monkeypatch.setattr(common_build, "_unpacked", lambda *given: folder)
    return folder


def build_chat_library(folder: Path) -> progress.SetupFailed:
    """Tries it for a llama_cpp in `folder`."""
    package = folder / "llama_cpp"
    (package / "lib").mkdir(parents=True)
    (package / "__init__.py").touch()
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with pytest.raises(progress.SetupFailed) as failure:
        common_build.install(python, folder / "llama.txt", folder / "common.log")
    assert list((package / "lib").iterdir()) == [], "no half library"
    return failure.value


def compiler(path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


@pytest.mark.parametrize("missing", ["cmake", "ninja"])
def test_a_tool_that_the_chat_library_needs_is_named(
    missing: str, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    for tool in {"cmake", "ninja"} - {missing}:
        compiler(tmp_path / "bin" / tool, monkeypatch, "exit 1")
    said = str(build_chat_library(tmp_path))
    assert f"There is no {missing}" in said and "make clean, and then make setup" in said


def test_a_compiler_that_is_not_there_is_named(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    assert str(tmp_path / "common.log") in str(build_chat_library(tmp_path))
    assert "no-such-compiler" in capsys.readouterr().err


def test_a_compiler_that_compiles_nothing_shows_its_words(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler(tmp_path / "c++", monkeypatch, "echo 'the licence has run out' >&2; exit 1")
    assert str(tmp_path / "common.log") in str(build_chat_library(tmp_path))
    assert "the licence has run out" in capsys.readouterr().err


def test_an_error_in_the_chat_library_is_shown_with_its_file(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stand-in compiles what cmake tries out."""
    real = shutil.which("c++")
    script = f'case "$*" in *cmTC*|*CMakeCXXCompilerId*) exec {real} "$@";; esac; for last; do :; done; '
    compiler(tmp_path / "c++", monkeypatch, script + 'echo "$last:1: error: chat.h was not found" >&2; exit 1')
    failure = build_chat_library(tmp_path)
    assert "exit status" in str(failure) and str(tmp_path / "common.log") in str(failure)
    assert ".cpp:1: error: chat.h was not found" in capsys.readouterr().err


def test_a_llama_cpp_that_is_not_there_is_said(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named llama_cpp' >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(progress.SetupFailed, match="llama_cpp cannot be imported: No module named llama_cpp"):
        common_build.install(python, tmp_path / "llama.txt", tmp_path / "common.log")


def test_a_failed_step_is_repeated_and_a_finished_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "VENV", tmp_path)
    runs: list[str] = []

    def fail() -> None:
        runs.append("failed")
        raise progress.SetupFailed("no")

    with pytest.raises(progress.SetupFailed):
        environment._once("llama", "cpu abc", fail)
    environment._once("llama", "cpu abc", lambda: runs.append("made"))
    environment._once("llama", "cpu abc", lambda: runs.append("again"))
    environment._once("llama", "cuda abc", lambda: runs.append("switched"))
    assert runs == ["failed", "made", "switched"]
    assert environment._built_variant() == CUDA


@pytest.mark.parametrize(
    ("ready", "arguments", "expected"),
    [
        (None, [], "environment.py"),
        (None, ["CUDA=1"], "--variant cuda"),
        ("cpu", [], None),
        ("cpu", ["CUDA=1"], "--variant cuda"),
        ("cpu", ["CUDA=0"], None),
        ("cuda", [], None),
        ("cuda", ["CUDA=1"], None),
        ("cuda", ["CUDA=0"], "--variant cpu"),
    ],
)
def test_make_sets_up_only_when_something_changed(
    tmp_path: Path, ready: str | None, arguments: list[str], expected: str | None
) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in ("setup", "requirements"):
        shutil.copytree(ROOT / folder, tmp_path / folder, copy_function=shutil.copy)
    (tmp_path / "actors" / "serving").mkdir(parents=True)
    for source in (ROOT / "actors" / "serving").glob("*.cpp"):
        shutil.copy(source, tmp_path / "actors" / "serving")
    if ready is not None:
        (tmp_path / ".venv").mkdir()
        (tmp_path / ".venv" / "ready").write_text(ready + "\n")
    command = ["make", "--dry-run", "--no-print-directory", "setup", *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    if expected is None:
        assert "environment.py" not in result.stdout
    else:
        assert expected in result.stdout
