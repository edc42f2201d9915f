"""`ray job submit --working-dir . -- python -m arriero up --detach`: it outlives the job, a newer one replaces it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from service import Reference, eventually

from actors.bootstrap import take_down
from actors.gateway.server import listen
from actors.names import NAMESPACE
from arriero import Client
from scheduler.units import GIB, MIB

pytestmark = [pytest.mark.ray, pytest.mark.llama, pytest.mark.slow]
SOURCE = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running cluster of somebody's, with a dashboard; the URL where it takes jobs."""
    state = tmp_path_factory.mktemp("state")
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        # What a job's "python" is, and where it remembers things, comes from where Ray was started.
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("XDG_STATE_HOME", str(state))
        patch.setenv("RAY_ADDRESS", "")
        arguments = {"num_cpus": 2, "object_store_memory": 100 * MIB, "include_dashboard": True, "dashboard_port": port}
        cluster: Any = Cluster(initialize_head=True, head_node_args=arguments)
        try:
            ray.init(address=cluster.address, log_to_driver=False, namespace=NAMESPACE)
            yield f"http://127.0.0.1:{port}"
            take_down()
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A working tree of Arriero with a model that is far too large to be packed."""
    folder = tmp_path / "arriero"
    for name in ("arriero", "actors", "scheduler"):
        shutil.copytree(SOURCE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(SOURCE / ".rayignore", folder)
    with (folder / "enorme.gguf").open("wb") as file:
        file.truncate(2 * GIB)
    return folder


def submit(dashboard: str, checkout: Path, models: Path, port: int) -> str:
    """What the job printed."""
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "job", "submit"),
            *("--address", dashboard, "--working-dir", ".", "--"),
            *("python", "-m", "arriero", "up", "--detach", "--models", str(models)),
            *("--virtual-gpus", "80MiB", "--port", str(port)),
        ],
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


@pytest.mark.timeout(300)
def test_the_service_outlives_its_job_and_a_newer_job_replaces_it(
    dashboard: str, checkout: Path, models: Path, reference: Reference
) -> None:
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    ((prompt, answer),) = reference.questions(models / "alba.gguf")
    assert "Arriero is up" in submit(dashboard, checkout, models, port)
    with Client(f"http://127.0.0.1:{port}") as client:
        assert client.complete("alba", prompt, max_tokens=10, temperature=0.0).text == answer
        first = client.status()
        (replica,) = first.replicas
        runner = psutil.Process(replica.pid)
        assert "_ray_pkg_" in runner.cwd()  # it runs from what was submitted

        (checkout / "scheduler" / "newer.py").write_text('"""Something new."""\n')
        assert "replaced" in submit(dashboard, checkout, models, port)
        eventually(lambda: not runner.is_running(), "the old runner to be gone")
        second = client.status()
        assert second.version != first.version
        assert not second.replicas
        assert [gpu.used_bytes for gpu in second.gpus] == [0]
        assert client.complete("alba", prompt, max_tokens=10, temperature=0.0).text == answer
