"""Processes that hang, by SIGSTOP: their node ends them, and what follows is what follows a death."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from service import (
    LONG,
    Listener,
    Reference,
    Service,
    answers,
    eventually,
    private_ray,
    process_of,
    processes_of,
    works,
)

from actors.devices.virtual import DEVICE_PROCESS
from arriero.api import EngineFailed

pytestmark = [pytest.mark.ray, pytest.mark.llama, pytest.mark.slow]


@pytest.fixture(scope="module")
def service(models: Path) -> Iterator[Service]:
    with private_ray(), Service(models, virtual_gpus=["84MiB", "36MiB"], defaults={"n_ctx": 4096}) as service:
        yield service


@pytest.fixture(autouse=True)
def nothing_leaks(service: Service) -> Iterator[None]:
    yield
    service.unload_all()


def runner_of(service: Service, model: str) -> psutil.Process:
    return psutil.Process(service.replica(model).pid)


def why_it_died(service: Service, after: int) -> str:
    (death,) = eventually(lambda: service.notices("replica_died", after=after), "the death to be told")
    return str(death.message)


def test_an_idle_runner_that_stands_still(service: Service, reference: Reference) -> None:
    service.client.load("alba")
    seq = service.last_seq()
    runner_of(service, "alba").suspend()
    assert works(service, reference, "alba")
    assert "it stood still for 5 s" in why_it_died(service, seq)


def test_a_busy_runner_that_stands_still(service: Service, reference: Reference) -> None:
    listener = Listener(service, "alba")
    seq = service.last_seq()
    runner_of(service, "alba").suspend()
    listener.end()
    assert isinstance(listener.error, EngineFailed)
    assert "it stood still for 5 s" in listener.error.message
    assert "it stood still for 5 s" in why_it_died(service, seq)
    assert works(service, reference, "alba")


def test_a_runner_that_stands_still_does_not_hold_up_its_own_eviction(service: Service, reference: Reference) -> None:
    service.client.load("alba")
    runner = runner_of(service, "alba")
    runner.suspend()
    service.client.unload("alba")
    eventually(lambda: not runner.is_running(), "the process to end")
    service.await_empty()
    assert works(service, reference, "alba")


def test_a_device_process_that_stands_still(service: Service, reference: Reference) -> None:
    listener = Listener(service, "alba")
    seq = service.last_seq()
    (device,) = [
        process for process in runner_of(service, "alba").children() if DEVICE_PROCESS in " ".join(process.cmdline())
    ]
    device.suspend()
    listener.end()
    assert isinstance(listener.error, EngineFailed)
    assert "its device process stood still for 5 s" in why_it_died(service, seq)
    assert works(service, reference, "alba")


def test_what_a_crash_was_is_told(service: Service, reference: Reference) -> None:
    service.client.load("alba")
    seq = service.last_seq()
    runner_of(service, "alba").send_signal(signal.SIGSEGV)
    assert "SIGSEGV" in why_it_died(service, seq)
    assert works(service, reference, "alba")


def test_a_scheduler_that_stands_still(service: Service, reference: Reference) -> None:
    service.client.load("alba")
    before = service.replica("alba").replica_id
    listener = Listener(service, "yunta")
    process_of("SchedulerActor").suspend()
    assert works(service, reference, "alba")
    assert service.replica("alba").replica_id == before
    assert service.notices("scheduler_restarted")
    assert listener.goes_on()
    listener.leave()


def test_a_gateway_that_stands_still(service: Service, reference: Reference) -> None:
    service.client.load("alba")
    gateway = process_of("GatewayActor")
    gateway.suspend()
    eventually(lambda: not gateway.is_running(), "the gateway to be ended")
    eventually(lambda: answers(service), "another gateway at its address")
    assert works(service, reference, "alba")


def test_actors_of_the_node_and_of_gpus_that_stand_still(service: Service, reference: Reference) -> None:
    gpus = processes_of("GpuActor")
    for process in gpus:
        process.suspend()
    for process in gpus:
        eventually(lambda process=process: not process.is_running(), "the actors of the GPUs to be ended")
    assert works(service, reference, "alba")

    node, seq = process_of("NodeActor"), service.last_seq()
    node.suspend()
    assert eventually(lambda: service.notices("node_silent", after=seq), "the node to be called silent")
    with ThreadPoolExecutor(1) as pool:  # nothing is put there meanwhile, and nothing is refused
        asked = pool.submit(service.complete, "bruma", "llamas", max_tokens=LONG // 100)
        eventually(lambda: not node.is_running(), "the actor of the node to be ended")
        assert asked.result(120)
