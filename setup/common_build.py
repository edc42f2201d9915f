"""Builds the library for chats: actors/serving/llama_common.cpp, and the parts of llama.cpp's `common` that it needs.
It opens sounds, too: actors/serving/sound_files.cpp, with the library that llama.cpp has for them.

The source is the archive that llama-cpp-python was built from; pip checks it against the pinned hash. Only what chats
need is compiled: two minutes of processor time, half of it on 2 cores by the clock. Needs no network but the package
registry.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from llama_build import CPU, build_environment
from progress import SetupFailed, run

LIBRARY = "libarriero_common.so"
PROJECT = Path(__file__).resolve().parent / "llama_common"
_SERVING = PROJECT.parents[1] / "actors" / "serving"
SOURCES = (
    PROJECT / "CMakeLists.txt",
    *(_SERVING / name for name in ("llama_common.cpp", "llama_drafts.cpp", "sound_files.cpp")),
)
_WHERE = "import pathlib, llama_cpp; print(pathlib.Path(llama_cpp.__file__).parent / 'lib')"


def install(python: Path, requirements: Path, log: Path) -> None:
    """Builds it for the llama_cpp that `python` imports, and puts it there. Raises SetupFailed with the way out."""
    where = subprocess.run([str(python), "-c", _WHERE], check=False, capture_output=True, text=True)
    if where.returncode != 0:
        raise SetupFailed(f"llama_cpp cannot be imported: {where.stderr.strip()[-400:]}")
    libraries = Path(where.stdout.strip())
    environment = build_environment(python, CPU)
    for tool in ("cmake", "ninja"):
        if shutil.which(tool, path=environment["PATH"]) is None:
            raise SetupFailed(
                f"There is no {tool} in {python.parent}, where the pinned packages put it, or on PATH. Make the "
                "environment anew: make clean, and then make setup"
            )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = _unpacked(python, requirements, folder, log, environment)
        build = folder / "build"
        configure = ["cmake", "-S", str(PROJECT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DLLAMA_CPP={source}", f"-DLLAMA_LIB={libraries}"]
        run(configure, label="chat library", log=log, step=r"^-- ", env=environment)
        print("Building llama.cpp's chat code: about a minute on 2 cores.", flush=True)
        run(["cmake", "--build", str(build)], label="chat library", log=log, step=r"\[\d+/\d+\]", env=environment)
        new = libraries / f"{LIBRARY}.new"
        shutil.copy2(build / LIBRARY, new)
        new.replace(libraries / LIBRARY)  # a service that runs keeps the old one: a file written over would end it


def _unpacked(python: Path, requirements: Path, folder: Path, log: Path, environment: dict[str, str]) -> Path:
    """llama.cpp's folder in the source archive of the pinned release."""
    command = [str(python), "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    command += ["--no-binary", "llama-cpp-python", "--no-build-isolation", "--dest", str(folder)]
    run([*command, "-r", str(requirements)], label="chat library", log=log, step=r"^Downloading \S+", env=environment)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data") if hasattr(tarfile, "data_filter") else packed.extractall(folder)
    (source,) = folder.glob("*/vendor/llama.cpp")
    if not (source / "common" / "chat.cpp").exists():
        raise SetupFailed(f"{archive.name} holds no vendor/llama.cpp/common: it is no release that Arriero knows")
    return source
