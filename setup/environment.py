"""Makes `.venv`: the environment that every make target runs in. `make setup` calls this; it needs only Python >= 3.10.

Steps, each skipped when its stamp says that it is done: create the environment, install requirements/lock.txt (every
package pinned, with hashes), build llama-cpp-python and llama.cpp's chat code, install Arriero itself as an editable
package. Stamps lie in the environment and name what they were made from, so that a changed lock file, interpreter or
build variant is noticed.
`.venv/ready` holds the build variant (cpu or cuda) and is there only while everything is in place.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - this file is what an older Python gets to read
    sys.exit(
        f"Arriero needs Python 3.10 or newer, and {sys.executable} is {sys.version_info[0]}.{sys.version_info[1]}. "
        "Install a newer one and name it, for example: make setup PYTHON=python3.12"
    )

import argparse
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import common_build
import llama_build
from progress import SetupFailed, run

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "lock.txt"
LLAMA = ROOT / "requirements" / "llama.txt"
PROJECT = ROOT / "pyproject.toml"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
READY = VENV / "ready"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def main() -> int:
    parser = argparse.ArgumentParser(description="Make .venv, the environment that Arriero runs in.")
    variants = [llama_build.CPU, llama_build.CUDA]
    parser.add_argument("--variant", choices=variants, help="how llama.cpp is built; default: as it is, else cpu")
    try:
        set_up(parser.parse_args().variant)
    except SetupFailed as failure:
        print(f"\nSet-up stopped. {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nSet-up interrupted; run it again and it goes on where it stopped.", file=sys.stderr)
        return 130
    return 0


def set_up(wanted_variant: str | None) -> None:
    """Brings `.venv` up to date. Raises SetupFailed."""
    variant = wanted_variant or _built_variant() or llama_build.CPU
    require_compiler()
    READY.unlink(missing_ok=True)
    create_environment()
    _once("packages", _digest(LOCK), install_packages)
    llama = f"{variant} {_digest(LLAMA)}"
    _once("llama", llama, lambda: install_llama(variant))
    _once("common", " ".join([llama, *map(_digest, common_build.SOURCES)]), install_common)
    _once("arriero", _digest(PROJECT), install_arriero)
    READY.write_text(variant + "\n")
    print(f"Ready: {VENV.name} holds Arriero with llama.cpp for {variant.upper()}.")
    if variant == llama_build.CPU and NVIDIA_DRIVER.exists():
        print("There is an NVIDIA driver here, but this build computes on the CPU. For the card: make setup CUDA=1")


def _built_variant() -> str:
    """The variant that `.venv` was last built with, or empty."""
    stamp = _stamp("llama")
    return stamp.read_text().split()[0] if stamp.exists() else ""


def require_compiler() -> None:
    """Raises SetupFailed when llama.cpp could not be compiled here: better now than after the downloads."""
    wanted = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in wanted):
        raise SetupFailed(
            f"There is no C++ compiler (looked for {', '.join(wanted)}); llama.cpp is compiled for this machine's "
            "processor. Install one, for example: sudo apt install build-essential, or: sudo dnf install gcc-c++ make"
        )


def create_environment() -> None:
    """Makes `.venv`, anew when it belongs to another Python version than the one running or does not start."""
    same_version = "import sys; sys.exit(sys.version_info[:2] != ({}, {}))".format(*sys.version_info[:2])
    if PYTHON.exists() and subprocess.run([str(PYTHON), "-c", same_version], check=False).returncode == 0:
        return
    if VENV.exists():
        shutil.rmtree(VENV)
    made = subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=False, capture_output=True, text=True)
    if made.returncode != 0:
        shutil.rmtree(VENV, ignore_errors=True)
        major_minor = "{}.{}".format(*sys.version_info[:2])
        raise SetupFailed(
            f"python -m venv failed: {(made.stdout + made.stderr).strip()[-400:]}\n"
            f"On Debian and Ubuntu it is a package of its own: sudo apt install python{major_minor}-venv"
        )


def install_packages() -> None:
    """Installs every pin of the lock file; pip checks each download against its hashes."""
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    step = r"^(?:Collecting|Processing) \S+|^Installing collected packages"
    run([*command, "-r", str(LOCK)], label="packages", log=_log("packages"), step=step)


def install_llama(variant: str) -> None:
    """Builds llama-cpp-python; what lay beside its libraries goes with the old ones."""
    _stamp("common").unlink(missing_ok=True)
    llama_build.install(PYTHON, LLAMA, variant, _log("llama"))


def install_common() -> None:
    """Builds llama.cpp's chat code, which llama-cpp-python leaves out."""
    common_build.install(PYTHON, LLAMA, _log("common"))


def install_arriero() -> None:
    """Installs this checkout as an editable package, so that the `arriero` command runs the files that lie here.

    By path (compat) and not by setuptools' finder: a checkout in a folder named `arriero` would else hide the package
    from whoever runs Python in the folder above.
    """
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    command += ["--config-settings", "editable_mode=compat", "--editable", str(ROOT)]
    run(command, label="arriero", log=_log("arriero"), step=r"^\w+ing [^:\n]*")


def _once(name: str, made_from: str, work: Callable[[], None]) -> None:
    stamp = _stamp(name)
    if stamp.exists() and stamp.read_text() == made_from:
        return
    stamp.unlink(missing_ok=True)
    work()
    stamp.write_text(made_from)


def _stamp(name: str) -> Path:
    return VENV / f"stamp-{name}"


def _log(name: str) -> Path:
    return VENV / "log" / f"{name}.log"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
