"""The command line from nothing to nothing: a Ray of its own is started, used, found again and ended."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.llama, pytest.mark.slow]
Arriero = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def arriero(tmp_path: Path) -> Iterator[Arriero]:
    """Run a command as a user without any settings of their own would."""
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "NO_COLOR": "1"}
    environment.pop("RAY_AUTH_MODE", None)

    def run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(
            [sys.executable, "-m", "arriero", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert ended.returncode == 0 or not check, ended.stdout + ended.stderr
        return ended

    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    yield run
    run("down", "--address", "local", check=False)


@pytest.mark.timeout(300)
def test_up_use_and_down(arriero: Arriero, models: Path, tmp_path: Path) -> None:
    up = ("up", "--models", str(models), "--virtual-gpus", "40MiB", "--port", "0", "--address", "local", "--detach")
    assert "Arriero is up at http://127.0.0.1:" in arriero(*up).stdout
    state: dict[str, Any] = json.loads((tmp_path / "arriero" / "deployment.json").read_text())
    head = psutil.Process(state["ray_pid"])
    family = [head, *head.children(recursive=True)]
    open_doors = [
        (process.name(), door.laddr)
        for process in family
        for door in process.net_connections("tcp")
        if door.status == psutil.CONN_LISTEN and not door.laddr.ip.removeprefix("::ffff:").startswith("127.")
    ]
    assert open_doors == []
    parts = [part.name() for part in head.children() if part.status() != psutil.STATUS_ZOMBIE]
    assert sorted(parts) == ["gcs_server", "raylet"], "what is not needed takes no memory"

    assert arriero("run", "alba", "llamas", "--max-tokens", "5").stdout.strip()
    (replica,) = json.loads(arriero("ps", "--json").stdout)["replicas"]
    assert (replica["model"], replica["state"]) == ("alba", "ready")
    assert "was already running" in arriero(*up).stdout
    assert "was already running" in arriero(*up[:-3], "--detach").stdout, "without an address it is found too"

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        elsewhere = arriero("up", "--models", str(models), "--port", str(taken.getsockname()[1]), "-d", check=False)
    assert elsewhere.returncode == 1 and "choose another --port. Arriero still runs at" in elsewhere.stderr
    (still,) = json.loads(arriero("ps", "--json").stdout)["replicas"]
    assert still["pid"] == replica["pid"], "what ran is as it was"

    arriero("down", "--address", "local")
    _, alive = psutil.wait_procs(
        [*family, psutil.Process(replica["pid"])] if psutil.pid_exists(replica["pid"]) else family
    )
    assert not alive
    assert not (tmp_path / "arriero" / "deployment.json").exists()
    assert arriero("ps", check=False).returncode == 1


@pytest.mark.timeout(300)
def test_two_at_once_bring_up_one(arriero: Arriero, models: Path, tmp_path: Path) -> None:
    up = ("up", "--models", str(models), "--virtual-gpus", "40MiB", "--port", "0", "--address", "local", "--detach")
    with ThreadPoolExecutor(2) as pool:
        both = [ended.stdout for ended in pool.map(lambda _: arriero(*up), range(2))]
    (first,) = (text for text in both if "Arriero is up at http" in text)
    (second,) = (text for text in both if "Arriero was already running at http" in text)
    url = json.loads((tmp_path / "arriero" / "deployment.json").read_text())["url"]
    assert url in first and url in second
