"""Processes killed with kill -9, clients that leave: who asked is told, memory comes back, the next one is served."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import ray
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

from actors.names import NAMESPACE, SCHEDULER, gpu_name, node_name
from arriero.api import EngineFailed
from scheduler.units import MIB, DeviceId, NodeId

pytestmark = [pytest.mark.ray, pytest.mark.llama, pytest.mark.slow]


@pytest.fixture(scope="module")
def service(models: Path) -> Iterator[Service]:
    with private_ray(), Service(models, virtual_gpus=["84MiB", "36MiB"], defaults={"n_ctx": 4096}) as service:
        yield service


@pytest.fixture(autouse=True)
def nothing_leaks(service: Service) -> Iterator[None]:
    yield
    service.unload_all()


def kill(pid: int | None) -> None:
    assert pid is not None
    psutil.Process(pid).kill()


def test_a_runner_killed_in_mid_stream(service: Service, reference: Reference) -> None:
    listener = Listener(service, "alba")
    dead = service.replica("alba")
    kill(dead.pid)
    listener.end()
    assert isinstance(listener.error, EngineFailed)
    assert "alba" in listener.error.message
    eventually(lambda: not service.replicas("alba"), "the dead replica to be forgotten")
    assert [gpu.used_bytes for gpu in service.client.status().gpus] == [0, 0]
    assert works(service, reference, "alba")


def test_a_runner_killed_before_the_first_token_is_replaced_and_nobody_notices(
    service: Service, reference: Reference
) -> None:
    service.client.load("alba")
    runner = psutil.Process(service.replica("alba").pid)
    ((prompt, answer),) = reference.questions(service.path("alba"))
    runner.suspend()  # it takes the request and never says a word
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(service.complete, "alba", prompt)
        eventually(lambda: service.replica("alba").active, "the request to reach the runner")
        runner.kill()
        assert asked.result(120) == answer


def test_a_runner_killed_in_an_answer_in_one_piece_is_replaced_and_nobody_notices(service: Service) -> None:
    whole = service.complete("alba", "llamas", LONG // 2)
    before = service.replica("alba")
    runner = psutil.Process(before.pid)
    spent_s = runner.cpu_times().user
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(service.complete, "alba", "llamas", LONG // 2)
        eventually(lambda: runner.cpu_times().user > spent_s + 0.1, "the answer to be under way")
        runner.kill()
        assert asked.result(120) == whole
    assert service.replica("alba").replica_id != before.replica_id


def test_a_runner_killed_while_it_loads_is_tried_again(service: Service, reference: Reference) -> None:
    seq = service.last_seq()
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(service.client.load, "bruma")
        pid = eventually(lambda: [r.pid for r in service.replicas("bruma") if r.state == "loading" and r.pid], "a load")
        kill(pid[0])
        loading.result(120)
    assert service.notices("load_failed", after=seq)
    assert works(service, reference, "bruma")


def spares(service: Service) -> list[psutil.Process]:
    """Runners that no replica lives in."""
    taken = {replica.pid for replica in service.replicas()}
    return [process for process in processes_of("RunnerActor") if process.pid not in taken]


def test_a_load_takes_the_spare_runner_and_one_that_died_is_not_missed(service: Service, reference: Reference) -> None:
    eventually(lambda: len(spares(service)) == 1, "a spare runner")
    (spare,) = spares(service)
    assert works(service, reference, "alba")
    assert service.replica("alba").pid == spare.pid
    eventually(lambda: len(spares(service)) == 1, "another spare runner")
    (spare,) = spares(service)
    seq = service.last_seq()
    kill(spare.pid)
    assert works(service, reference, "bruma")
    assert service.replica("bruma").pid != spare.pid
    assert not service.notices("load_failed", after=seq)
    eventually(lambda: spares(service), "a third spare runner")


def test_a_client_that_leaves_frees_its_slot(service: Service) -> None:
    with service.client.complete("alba", "llamas", max_tokens=LONG, temperature=0.0, stream=True) as stream:
        pieces = iter(stream)  # kept, for an iterator that is dropped closes the stream
        next(pieces)
        assert service.replica("alba").active == 1
    eventually(lambda: not service.replica("alba").active, "the slot to be free")
    assert service.complete("alba", "llamas")  # the engine is free too: it serves one at a time


def test_a_client_that_leaves_the_queue_is_not_served(service: Service) -> None:
    listener = Listener(service, "alba")
    assert service.client.load("alba").load_s == 0.0  # loaded it is: to be told so takes no slot
    with pytest.raises(httpx.ReadTimeout), httpx.Client(trust_env=False) as impatient:
        impatient.post(f"{service.deployment.url}/v1/completions", json={"model": "alba", "prompt": "x"}, timeout=1.0)
    eventually(lambda: not service.client.status().queue, "the queue to be empty")
    assert listener.goes_on()
    listener.leave()


def test_the_scheduler_killed_under_requests(service: Service, reference: Reference) -> None:
    service.client.load("alba")
    listener = Listener(service, "yunta")
    before = {replica.model: replica.replica_id for replica in service.replicas()}
    process_of("SchedulerActor").kill()
    assert works(service, reference, "alba")  # asked while the scheduler is away
    assert {replica.model: replica.replica_id for replica in service.replicas()} == before, "nothing is loaded twice"
    eventually(lambda: len(spares(service)) == 1, "one spare runner to be left")
    assert len(service.notices("replica_adopted")) == 2
    assert service.notices("scheduler_restarted")
    assert listener.goes_on()
    assert service.replica("yunta").active == 1, "its lease was found at the runner"
    gpus = service.client.status().gpus
    assert all(0 < gpu.used_bytes <= gpu.booked_bytes + MIB for gpu in gpus), gpus
    assert works(service, reference, "bruma")  # evicts alba, which was adopted and is idle
    assert {replica.model for replica in service.replicas()} == {"yunta", "bruma"}
    assert listener.goes_on()
    listener.leave()
    assert listener.error is None
    eventually(lambda: not service.replica("yunta").active, "the lease from before to be given back")


def test_a_scheduler_whose_books_break_starts_anew(service: Service, reference: Reference) -> None:
    assert works(service, reference, "alba")
    replica_id, broken_s = service.replica("alba").replica_id, time.monotonic()
    scheduler = ray.get_actor(SCHEDULER, namespace=NAMESPACE)
    scheduler.report_device.remote("no reading at all")
    eventually(
        lambda: time.monotonic() - service.client.status().uptime_s > broken_s, "the scheduler to be another one"
    )
    assert works(service, reference, "alba")
    assert service.replica("alba").replica_id == replica_id


def test_the_gateway_killed_under_requests(service: Service, reference: Reference) -> None:
    url = service.deployment.url
    listener = Listener(service, "alba")
    process_of("GatewayActor").kill()
    listener.end()
    assert listener.error is not None
    eventually(lambda: answers(service), "the gateway to be back at its address")
    assert service.deployment.url == url
    eventually(lambda: not service.replica("alba").active, "the lost client's lease to be void")
    assert works(service, reference, "alba")  # at once: nobody computes for the client that was lost


def test_the_actors_of_nodes_and_gpus_killed(service: Service, reference: Reference) -> None:
    assert works(service, reference, "alba")
    node_id = NodeId(service.client.status().nodes[0].node_id)
    device_id = DeviceId(service.client.status().gpus[0].device_id)
    process_of("NodeActor").kill()
    for process in processes_of("GpuActor"):
        process.kill()
    assert works(service, reference, "bruma")
    service.unload_all()  # needs them all: processes are seen to end, devices are read
    for name in (node_name(node_id), gpu_name(device_id)):  # ended for good: started again
        ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)
    eventually(lambda: {node_name(node_id), gpu_name(device_id)} <= names(), "the actors to be there again")
    assert works(service, reference, "cumbre")


def names() -> set[str]:
    return {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
