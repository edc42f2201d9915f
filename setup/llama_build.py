"""Builds llama-cpp-python from source, into an environment or apart, and makes sure that it is what Arriero needs.

Invariant: after `install` and `build_apart` return, the library has llama.cpp's RPC backend (virtual GPUs and layouts
over several nodes are RPC devices) and is a CUDA build exactly when that was asked for. pip keeps wheels it has built,
but under a key that does not know CMAKE_ARGS: a cached wheel of another build is therefore noticed here and replaced.
Cost: about 7 minutes on 2 cores without CUDA, several times that with it; seconds from pip's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from progress import SetupFailed, run

CPU, CUDA = "cpu", "cuda"

# Runs in the target environment. The CUDA backend is looked for as a file: asking llama.cpp would need a card.
PROBE = """
import json, pathlib, llama_cpp
files = pathlib.Path(llama_cpp.__file__).parent.rglob("*ggml-cuda*")
print(json.dumps({"rpc": bool(llama_cpp.llama_supports_rpc()), "cuda": any(files)}))
"""


@dataclass(frozen=True)
class Build:
    """What a llama-cpp-python found in an environment is; `error` is why it could not be imported, or empty."""

    rpc: bool
    cuda: bool
    error: str = ""

    def fault(self, variant: str) -> str:
        """Why this build will not do for `variant`; empty when it will."""
        if self.error:
            return f"it cannot be imported ({self.error})"
        if not self.rpc:
            return "it lacks the RPC backend"
        if self.cuda != (variant == CUDA):
            return "it was built with CUDA" if self.cuda else "it was built without CUDA"
        return ""


def probe(python: Path, apart: Path | None = None) -> Build:
    """The build of llama-cpp-python that `python` imports, from the folder `apart` if that is given."""
    environment = looking_into(apart) if apart else None
    result = subprocess.run([str(python), "-c", PROBE], check=False, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        last_line = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        return Build(rpc=False, cuda=False, error=last_line)
    found = json.loads(result.stdout.strip().splitlines()[-1])
    return Build(rpc=found["rpc"], cuda=found["cuda"])


def looking_into(apart: Path) -> dict[str, str]:
    """The environment variables with which Python finds packages in the folder `apart` before all others."""
    return {**os.environ, "PYTHONPATH": str(apart)}


def build_apart(python: Path, release: str, folder: Path) -> str:
    """Builds a release for the CPU into `folder`/site, with the tools of `python`'s environment, which stays as it is.

    Returns the SHA-256 of its source archive. A build that is there already is left alone. Raises SetupFailed.
    """
    archive = _source(python, release, folder / "source", folder / "download.log")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    apart, requirements = folder / "site", folder / "llama.txt"
    requirements.write_text(f"llama-cpp-python=={release} --hash=sha256:{digest}\n")
    if not apart.exists() or probe(python, apart).fault(CPU):
        shutil.rmtree(apart, ignore_errors=True)
        install(python, requirements, CPU, folder / "build.log", apart)
    return digest


def _source(python: Path, release: str, folder: Path, log: Path) -> Path:
    """The source archive of a release, in `folder`."""
    if not list(folder.glob("*.tar.gz")):
        command = [
            str(python),
            "-m",
            "pip",
            "download",
            "--disable-pip-version-check",
            "--no-deps",
            "--dest",
            str(folder),
        ]
        command += ["--no-binary", "llama-cpp-python", "--no-build-isolation", f"llama-cpp-python=={release}"]
        run(command, label="download", log=log, step=r"^Downloading \S+", env=build_environment(python, CPU))
    (archive,) = folder.glob("*.tar.gz")
    return archive


def install(python: Path, requirements: Path, variant: str, log: Path, apart: Path | None = None) -> None:
    """Installs the pinned llama-cpp-python for `variant` and verifies it, in the folder `apart` if that is given.

    Raises SetupFailed with the way out.
    """
    environment = build_environment(python, variant)
    _pip_install(python, requirements, environment, log, apart, use_cache=True)
    fault = probe(python, apart).fault(variant)
    if fault:
        print(f"The llama-cpp-python that pip installed will not do: {fault}. Building it anew.", flush=True)
        _forget_cached_wheel(python)
        _pip_install(python, requirements, environment, log, apart, use_cache=False)
        fault = probe(python, apart).fault(variant)
    if fault:
        raise SetupFailed(
            f"llama-cpp-python was built, but {fault}. CMAKE_ARGS was {environment['CMAKE_ARGS']!r}; the log: {log}"
        )


def build_environment(python: Path, variant: str) -> dict[str, str]:
    """The environment variables of the build. CMAKE_ARGS of the caller come last, so that they win."""
    options = ["-DGGML_RPC=ON"]
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(python.parent), environment.get("PATH", "")])
    if variant == CUDA:
        options.append("-DGGML_CUDA=ON")
        environment.setdefault("CUDACXX", _cuda_compiler())
    environment["CMAKE_ARGS"] = " ".join([*options, environment.get("CMAKE_ARGS", "")]).strip()
    return environment


def _cuda_compiler() -> str:
    compiler = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if compiler is None:
        raise SetupFailed(
            "CUDA=1 needs NVIDIA's CUDA compiler, and there is no nvcc on PATH or in /usr/local/cuda/bin. Install the "
            "CUDA toolkit, or set CUDACXX to its nvcc, or leave out CUDA=1 for a build that computes on the CPU."
        )
    return compiler


def _pip_install(
    python: Path, requirements: Path, environment: dict[str, str], log: Path, apart: Path | None, *, use_cache: bool
) -> None:
    print(
        "Building llama.cpp with " + environment["CMAKE_ARGS"] + ": about 7 minutes on 2 cores "
        "(much longer with CUDA), seconds when pip has kept an earlier build.",
        flush=True,
    )
    command = [str(python), "-m", "pip", "install", "-v", "--disable-pip-version-check"]
    command += ["--require-hashes", "--no-deps", "--force-reinstall"]
    # The build tools come from the lock file, not from whatever is newest today.
    command += ["--no-binary", "llama-cpp-python", "--no-build-isolation", "-r", str(requirements)]
    if apart:
        command += ["--target", str(apart), "--upgrade"]
    if not use_cache:
        command.append("--no-cache-dir")
    run(command, label="llama.cpp", log=log, step=r"\[\d+/\d+\]", env=environment)


def _forget_cached_wheel(python: Path) -> None:
    """Takes the unsuitable wheel out of pip's cache. Fails where the cache is off or empty, which is as good."""
    subprocess.run(
        [str(python), "-m", "pip", "cache", "remove", "llama_cpp_python"],
        stdin=subprocess.DEVNULL, capture_output=True, check=False,
    )  # fmt: skip
