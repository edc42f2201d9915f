"""The main job, as a newcomer runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CLAIMS = 7  # three places, the order of evictions, memory back, all answered, all equal


@pytest.mark.ray
@pytest.mark.llama
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_holds_all_its_claims(tmp_path: Path) -> None:
    places = {"HOME": ".", "XDG_CACHE_HOME": "cache", "XDG_STATE_HOME": "state"}
    home = {name: str(tmp_path / folder) for name, folder in places.items()}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | home
    done = subprocess.run(
        [sys.executable, "-m", "arriero", "demo"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert "DOES NOT HOLD" not in done.stdout
    assert done.stdout.count("holds") == CLAIMS
