"""Looking at files and talking to a gateway must not wait for Ray or llama.cpp to be imported."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["arriero", "arriero.client", "arriero.cli.main"])
def test_importing_brings_neither_ray_nor_llama_cpp(module: str) -> None:
    program = f"import sys, {module}; print([m for m in ('ray', 'llama_cpp', 'fastapi', 'gguf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
