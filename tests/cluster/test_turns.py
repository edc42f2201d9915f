"""Who brings Arriero up or takes it down has the turn: another one waits, is told for whom, and gets it afterwards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from service import private_ray

from actors.turn import turn
from arriero.machine import alone
from scheduler.errors import Unavailable

ROOT = Path(__file__).parents[2]
HOLD_LOCK = "from arriero.machine import alone as turn"
HOLD_TURN = "import ray; ray.init('{address}', log_to_driver=False); from actors.turn import turn"


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with private_ray():
        yield str(ray.get_runtime_context().gcs_address)


def holder(imports: str) -> subprocess.Popen[str]:
    """A process that has the turn until it is killed."""
    program = f"{imports}\nwith turn(print): print('mine', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while process.stdout.readline().strip() != "mine":
        assert process.poll() is None
    return process


def test_commands_of_one_account_wait_for_each_other() -> None:
    said = []
    with holder(HOLD_LOCK) as other:

        def say(text: str) -> None:
            said.append(text)
            other.kill()

        with alone(say):
            assert said[0] == f"waiting for process {other.pid}, which starts or stops Arriero"


@pytest.mark.ray
@pytest.mark.slow
def test_drivers_of_one_cluster_wait_for_each_other(cluster: str) -> None:
    said = []
    with holder(HOLD_TURN.format(address=cluster)) as other:
        has_it = pytest.raises(Unavailable, match=rf"process {other.pid} on \S+ has been starting or stopping Arriero")
        with has_it, turn(print, 0):
            pass

        def say(text: str) -> None:
            said.append(text)
            other.kill()

        with turn(say, 60):
            assert f"waiting for process {other.pid} on " in said[0]
    with turn(print, 60):
        pass  # it was given back
