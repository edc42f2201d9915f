"""One Ray, one deployment after the other: replacing, modes and limits, and memory that others take."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from service import Reference, Service, eventually, private_ray, processes_of, suspended

from actors.bootstrap import take_down
from actors.devices.byte_count import ByteCount
from actors.gateway.server import listen
from actors.names import NAMESPACE, node_name
from arriero.api import DeadlineExceeded, QueueFull, Rejected
from scheduler.units import MIB, NodeId

pytestmark = [pytest.mark.ray, pytest.mark.llama, pytest.mark.slow]

ONE_GPU = ["24MiB"]  # room for one small model
TWO_GPUS = ["24MiB", "24MiB"]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with private_ray():
        yield


@pytest.fixture(scope="module")
def port() -> int:
    with listen("127.0.0.1", 0) as free:
        number: int = free.getsockname()[1]
        return number


@pytest.fixture
def up(models: Path, port: int) -> Iterator[Callable[..., Service]]:
    """Bring Arriero up with these settings; what runs with others is replaced, what runs with the same stays."""
    services: list[Service] = []

    def bring_up(**settings: Any) -> Service:
        services.append(Service(models, **{"virtual_gpus": TWO_GPUS, "server": {"port": port}, **settings}))
        return services[-1]

    yield bring_up
    try:
        if named():
            services[-1].unload_all()
    finally:
        for service in services:
            service.client.close()


def ask(service: Service, reference: Reference, model: str, number: int = 0) -> None:
    prompt, answer = reference.questions(service.path(model), 2)[number]
    assert service.complete(model, prompt) == answer


def named() -> set[str]:
    return {a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE}


def test_up_again_and_up_with_other_settings(up: Callable[..., Service], reference: Reference) -> None:
    first = up()
    ask(first, reference, "alba")
    before = named()
    again = up()
    assert (again.deployment.found, again.deployment.replaced) == (True, "")
    assert again.deployment.url == first.deployment.url
    assert named() == before
    assert first.replica("alba")

    old = [psutil.Process(replica.pid) for replica in first.replicas()]
    second = up(virtual_gpus=ONE_GPU)
    assert second.deployment.replaced == first.deployment.version != second.deployment.version
    assert second.deployment.url == first.deployment.url
    assert not any(process.is_running() for process in old)
    assert [gpu.used_bytes for gpu in second.client.status().gpus] == [0]
    ask(second, reference, "bruma")


# ---------------------------------------------------------------------- modes and limits


def test_a_pinned_model_stays_and_others_do_without(up: Callable[..., Service], reference: Reference) -> None:
    service = up(virtual_gpus=ONE_GPU)
    service.client.load("alba")
    service.client.pin("alba")
    pinned = service.replica("alba")
    assert pinned.pinned
    ask(service, reference, "bruma")
    assert service.replica("bruma").layout[-1].layers, "at least some layers are in host RAM"
    assert service.replica("alba").replica_id == pinned.replica_id
    ask(service, reference, "alba")
    service.client.pin("alba", False)
    service.client.unload("bruma")
    ask(service, reference, "cumbre")
    assert {share.device for share in service.replica("cumbre").layout if share.layers} == {"gpu0"}


def test_a_conversation_goes_on_after_its_model_was_evicted(up: Callable[..., Service], reference: Reference) -> None:
    service = up(virtual_gpus=ONE_GPU, policy={"min_residency_s": 0})
    said = " ".join(f"word {number}" for number in range(60))
    first = service.client.complete("alba", said, max_tokens=4, temperature=0.0)
    ask(service, reference, "bruma")
    assert not service.replicas("alba"), "there is room for one"
    again = service.client.complete("alba", said + first.text + " and", max_tokens=4, temperature=0.0)
    assert again.usage.cached_tokens >= first.usage.prompt_tokens
    assert service.complete("alba", said + first.text + " and", max_tokens=4) == again.text


# ---------------------------------------------------------------------- memory that others take


class Grabber:
    """Takes memory of the virtual GPUs that no runner of ours explains."""

    def __init__(self, service: Service) -> None:
        (node,) = service.client.status().nodes
        actor = ray.get_actor(node_name(NodeId(node.node_id)), namespace=NAMESPACE)
        self._devices = ray.get(actor.facts.remote(), timeout=60).devices
        self._held = [0 for _ in self._devices]
        self._service = service

    def others(self, index: int) -> int:
        """Device processes of runners on the device."""
        holders = ByteCount(self._devices[index].state_path).holders()
        return sum(holder.pid != os.getpid() for holder in holders)

    def grab(self, index: int, leave_bytes: int = 0) -> None:
        device = self._devices[index]
        count = ByteCount(device.state_path)
        size = device.total_bytes - count.used_bytes() - leave_bytes
        assert count.take(size, device.total_bytes, os.getpid())
        self._held[index] += size

    def give_back(self) -> None:
        for index, device in enumerate(self._devices):
            ByteCount(device.state_path).give_back(self._held[index], os.getpid())
            self._held[index] = 0
        eventually(
            lambda: self._foreign_bytes() < MIB, "the others' memory to be free"
        )  # llama.cpp's figures are rounded

    def _foreign_bytes(self) -> int:
        return sum(gpu.foreign_bytes for gpu in self._service.client.status().gpus)


@pytest.fixture
def grabber() -> Iterator[Callable[[Service], Grabber]]:
    made: list[Grabber] = []

    def make(service: Service) -> Grabber:
        made.append(Grabber(service))
        return made[-1]

    yield make
    for one in made:
        one.give_back()


def test_memory_taken_between_plan_and_load_is_refused_and_planned_again(
    up: Callable[..., Service], reference: Reference, grabber: Callable[[Service], Grabber]
) -> None:
    service = up(virtual_gpus=ONE_GPU)
    others, seq = grabber(service), service.last_seq()
    assert service.client.plan("alba").tier == "one GPU"
    with ThreadPoolExecutor(1) as pool:
        with suspended(processes_of("GpuActor")):
            others.grab(0, leave_bytes=2 * MIB)  # the scheduler still believes in 24 MiB
            asked = pool.submit(ask, service, reference, "alba")
            eventually(lambda: service.replicas("alba"), "the load to begin")
        asked.result(120)
    (refused,) = service.notices("load_failed", after=seq)
    assert "2.0 MiB free" in refused.message
    assert sum(share.bytes for share in service.replica("alba").layout if share.device == "gpu0") <= 2 * MIB
    assert service.client.status().gpus[0].foreign_bytes == 22 * MIB


def test_memory_taken_during_the_load_is_an_out_of_memory_that_harms_nobody(
    up: Callable[..., Service], reference: Reference, grabber: Callable[[Service], Grabber]
) -> None:
    service = up(virtual_gpus=ONE_GPU)
    others, seq = grabber(service), service.last_seq()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, service, reference, "alba")
        while not others.others(0):  # the runner has checked the memory and starts its device
            time.sleep(0.001)
        others.grab(0)
        asked.result(120)
    (failed,) = service.notices("load_failed", after=seq)
    assert "failed to allocate" in failed.message
    assert {share.device for share in service.replica("alba").layout if share.layers} == {"host"}
    others.give_back()
    ask(service, reference, "bruma")
    assert {share.device for share in service.replica("bruma").layout if share.layers} == {"gpu0"}


# ---------------------------------------------------------------------- more settings


def test_an_address_that_cannot_be_had(up: Callable[..., Service]) -> None:
    service = up(virtual_gpus=ONE_GPU)
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Rejected, match=f"cannot listen on 127.0.0.1:{port}.*choose another --port.*still runs at"):
            service.bring_up(server={"port": port})
        assert service.client.status().nodes, "what ran goes on"
        assert take_down()
        with pytest.raises(Rejected, match=f"cannot listen on 127.0.0.1:{port}.*choose another --port"):
            service.bring_up(server={"port": port})
    with pytest.raises(Rejected, match="API key"):
        service.bring_up(server={"host": "0.0.0.0"})
    assert not named(), "nothing is left of a deployment that failed"
    assert not take_down()


def test_a_single_active_model(up: Callable[..., Service], reference: Reference) -> None:
    service = up(policy={"max_active_models": 1})
    assert service.client.status().mode == "single active model"
    most = 0

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, sum(map(holds_a_model, processes_of("RunnerActor"))))
            time.sleep(0.02)

    done = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(6) as pool:
            models = ("alba", "bruma", "cumbre")
            for asked in [pool.submit(ask, service, reference, m, n) for n in range(2) for m in models]:
                asked.result(300)
    finally:
        done.set()
        watcher.join()
    assert most == 1


def holds_a_model(runner: psutil.Process) -> bool:
    """Whether it has begun to load one: a spare runner has neither a device process nor a model's file."""
    try:
        on_gpus = any("actors.devices.rpc_device" in child.cmdline() for child in runner.children())
        return on_gpus or ".gguf" in Path(f"/proc/{runner.pid}/maps").read_text()
    except (OSError, psutil.Error):
        return False


def test_an_idle_model_is_unloaded_after_its_time(up: Callable[..., Service], reference: Reference) -> None:
    service = up(defaults={"n_ctx": 1024, "keep_alive_s": 0.5})
    ask(service, reference, "alba")
    service.await_empty()
    assert service.notices("replica_idle")


def test_slots_are_shared_and_the_queue_is_bounded(up: Callable[..., Service], reference: Reference) -> None:
    service = up(policy={"queue_limit": 2}, defaults={"n_ctx": 1024, "n_seq_max": 2})
    service.client.load("alba")
    with ThreadPoolExecutor(4) as pool:
        for asked in [pool.submit(ask, service, reference, "alba", n % 2) for n in range(4)]:
            asked.result(120)
    assert (service.replica("alba").slots, service.replica("alba").n_ctx) == (2, 512)

    runner = psutil.Process(service.replica("alba").pid)
    with ThreadPoolExecutor(4) as pool:
        with suspended([runner]):
            answers = [pool.submit(service.complete, "alba", "llamas") for _ in range(2)]
            eventually(lambda: service.replica("alba").active == 2, "both slots to be taken")
            with pytest.raises(DeadlineExceeded, match="slot"):
                service.complete("alba", "llamas", deadline_s=0.5)
            answers += [pool.submit(service.complete, "alba", "llamas") for _ in range(2)]
            eventually(lambda: len(service.client.status().queue) == 2, "two requests to wait")
            with pytest.raises(QueueFull, match="2 requests are waiting"):
                service.complete("bruma", "llamas")
        assert all(answer.result(120) for answer in answers)
