"""The actors on a real Ray cluster: readings arrive, survive a restart of the scheduler, and runners can be killed."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from beside import Program
from tiny_llama import RUNNER, write_tiny_llama

from actors.devices.gpu import GpuActor
from actors.devices.node import NodeActor, NodeSettings
from actors.devices.processes import Process, started_at_s, this_process
from actors.devices.pulse import sign_in
from scheduler.errors import InvalidGGUF
from scheduler.units import MIB, NodeId

pytestmark = [pytest.mark.ray, pytest.mark.slow]
PATIENCE_S = 60.0


@ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=4)
class Scheduler:
    """Stands for the scheduler actor: keeps what is reported to it."""

    def __init__(self) -> None:
        self._devices: list[Any] = []
        self._nodes: list[Any] = []

    def report_device(self, reading: Any) -> None:
        self._devices.append(reading)

    def report_node(self, reading: Any) -> None:
        self._nodes.append(reading)

    def reported(self) -> tuple[list[Any], list[Any]]:
        return self._devices, self._nodes

    def pid(self) -> int:
        return os.getpid()


@ray.remote(num_cpus=0)
class RunnerActor:
    """Stands for a runner: a Ray actor of that name."""

    def identity(self) -> tuple[int, float | None]:
        return os.getpid(), started_at_s()

    def process(self) -> Process:
        return this_process()

    def hang(self) -> None:
        sign_in("n1", "RunnerActor", "a decode").promise(0.1, 0.05)
        time.sleep(1e6)

    def fail_an_assertion(self) -> None:
        sys.stderr.write("ggml.c:12: GGML_ASSERT(n_tokens > 0) failed\n")
        sys.stderr.flush()
        os.abort()


@ray.remote(num_cpus=0)
class Bystander:
    def identity(self) -> tuple[int, float | None]:
        return os.getpid(), started_at_s()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        namespace="devices",
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * MIB,
    )
    yield
    ray.shutdown()


def get(reference: Any) -> Any:
    return ray.get(reference, timeout=PATIENCE_S)


def eventually(holds: Callable[[], Any]) -> Any:
    """The first true answer of `holds`; None when there is none in good time."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            answer = holds()
        except ray.exceptions.RayActorError:
            answer = None
        if answer:
            return answer
        time.sleep(0.05)
    return None


@pytest.fixture
def node(cluster: None, tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    """A scheduler and the node actor that reports to it."""
    write_tiny_llama(tmp_path / "tiny.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nothing more")
    settings = NodeSettings((str(tmp_path),), (40 * MIB,), str(tmp_path / "state"))
    scheduler = Scheduler.remote()
    actor = NodeActor.remote(NodeId("n1"), settings, scheduler)
    yield scheduler, actor
    ray.kill(actor)
    ray.kill(scheduler)


def test_devices_and_nodes_report_and_go_on_after_a_restart_of_the_scheduler(
    node: tuple[Any, Any], beside: Callable[..., Program]
) -> None:
    scheduler, node_actor = node
    facts = get(node_actor.facts.remote())
    assert facts.address and facts.devices[0].total_bytes == 40 * MIB
    gpu = GpuActor.remote(facts.devices[0], scheduler)
    assert get(gpu.facts.remote()) == facts.devices[0]
    assert len(get(node_actor.sample_now.remote()).files) == 2

    devices, nodes = eventually(lambda: all(r := get(scheduler.reported.remote())) and r)
    assert devices[0].free_bytes == 40 * MIB
    assert sorted(Path(model.path).name for model in nodes[0].files) == ["broken.gguf", "tiny.gguf"]

    # A runner's device process shows, with the runner's pid, in a reading asked for and in those that are told.
    runner = beside(RUNNER, facts.devices[0].state_path, 40 * MIB)
    runner.line()
    assert get(gpu.sample_now.remote()).processes == {runner.process.pid: 0}
    assert eventually(lambda: get(scheduler.reported.remote())[0][-1].processes == {runner.process.pid: 0})

    before = get(scheduler.pid.remote())
    ray.kill(scheduler, no_restart=False)
    assert eventually(lambda: get(scheduler.pid.remote()) != before)
    assert eventually(lambda: all(get(scheduler.reported.remote())))
    ray.kill(gpu)


def test_headers_are_read_on_the_node_and_faults_are_values(node: tuple[Any, Any], tmp_path: Path) -> None:
    _, node_actor = node
    shape = get(node_actor.read_shape.remote(str(tmp_path / "tiny.gguf")))
    assert not isinstance(shape, Exception)
    assert isinstance(get(node_actor.read_shape.remote(str(tmp_path / "broken.gguf"))), InvalidGGUF)


def test_a_runner_is_seen_to_end_and_only_a_runner_is_killed(node: tuple[Any, Any]) -> None:
    _, node_actor = node
    runner, bystander = RunnerActor.remote(), Bystander.remote()
    pid, started = get(runner.identity.remote())
    other_pid, other_started = get(bystander.identity.remote())
    assert get(node_actor.process_alive.remote(pid, started))
    assert get(node_actor.wait_gone.remote([(pid, started)], 0.0)) == (pid,)

    assert not get(node_actor.kill_process.remote(other_pid, other_started))
    assert not get(node_actor.kill_process.remote(pid, started - 1.0))
    waiting = node_actor.wait_gone.remote([(pid, started)], PATIENCE_S)
    assert get(node_actor.kill_process.remote(pid, started))
    assert get(waiting) == ()
    assert not get(node_actor.process_alive.remote(pid, started))
    assert get(node_actor.process_alive.remote(other_pid, other_started))
    ray.kill(bystander)


def test_who_breaks_its_word_is_ended_and_the_reason_told(node: tuple[Any, Any]) -> None:
    _, node_actor = node
    runner, bystander = RunnerActor.remote(), RunnerActor.remote()
    process, other = get(runner.process.remote()), get(bystander.process.remote())
    hanging = runner.hang.remote()
    assert get(node_actor.wait_gone.remote([process.identity], PATIENCE_S)) == ()
    with pytest.raises(ray.exceptions.RayActorError):
        get(hanging)
    told = words(node_actor, process)
    assert re.fullmatch(r"a decode took more than \d+ s; the slowest similar one took 0.05 s", told)
    assert get(node_actor.process_alive.remote(*other.identity))
    assert words(node_actor, other) == ""
    ray.kill(bystander)


def test_what_a_runner_died_of_is_told(node: tuple[Any, Any], tmp_path: Path) -> None:
    _, node_actor = node
    runner = RunnerActor.remote()
    process = get(runner.process.remote())
    with pytest.raises(ray.exceptions.RayActorError):
        get(runner.fail_an_assertion.remote())
    assert words(node_actor, process) == "ggml.c:12: GGML_ASSERT(n_tokens > 0) failed; SIGABRT"
    elsewhere = tmp_path / "worker.err"
    elsewhere.write_text("GGML_ASSERT(secret) failed")
    assert words(node_actor, Process(*process.identity, str(elsewhere))) == "", "no log of Ray's"


def words(node_actor: Any, process: Process) -> str:
    return str(get(node_actor.last_words.remote(process)))
