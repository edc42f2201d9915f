"""Machines that share the work, that join later, and that are lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from service import Reference, Service, eventually

from actors.bootstrap import take_down
from actors.names import NAMESPACE
from scheduler.units import MIB

pytestmark = [pytest.mark.ray, pytest.mark.llama, pytest.mark.slow]
QUICK_TO_NOTICE = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "3",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    os.environ.update(QUICK_TO_NOTICE)
    node = {"num_cpus": 1, "object_store_memory": 100 * MIB}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
        take_down()
    finally:
        ray.shutdown()
        cluster.shutdown()
        for name in QUICK_TO_NOTICE:
            del os.environ[name]


@pytest.fixture(scope="module")
def service(cluster: Any, models: Path) -> Iterator[Service]:
    with Service(models, virtual_gpus=["24MiB"]) as service:
        yield service


def node_of(cluster: Any, service: Service, model: str) -> Any:
    """The node whose raylet is the parent of the model's runner: all nodes of this cluster have one host name."""
    raylet = psutil.Process(service.replica(model).pid).ppid()
    return next(node for node in cluster.list_all_nodes() if node.all_processes["raylet"][0].process.pid == raylet)


def test_two_machines_share_the_work_and_one_is_lost(cluster: Any, service: Service, reference: Reference) -> None:
    eventually(lambda: len(service.client.status().nodes) == 2, "the second node to join")

    def ask(model: str) -> None:
        ((prompt, answer),) = reference.questions(service.path(model))
        assert service.complete(model, prompt) == answer

    def has_a_free_gpu(model: str) -> bool:
        """Whole on a GPU beside the others: not in the host RAM of a node that was known before."""
        plan = service.client.plan(model)
        return plan.verdict == "free" and not any(share.layers for share in plan.shares if share.device == "host")

    ask("alba")
    eventually(lambda: has_a_free_gpu("bruma"), "the second node's files and memory to be known")
    ask("bruma")
    used = {model: node_of(cluster, service, model) for model in ("alba", "bruma")}
    assert used["alba"] is not used["bruma"], "each has room for one"
    gpus = {gpu.label for gpu in service.client.status().gpus}
    assert {share.device for replica in service.replicas() for share in replica.layout} <= {*gpus, "host"}

    (doomed,) = cluster.worker_nodes
    lost = next(model for model, node in used.items() if node is doomed)
    raylet = doomed.all_processes["raylet"][0].process
    runner = psutil.Process(service.replica(lost).pid)
    os.kill(raylet.pid, signal.SIGKILL)
    raylet.wait()  # else it stays a zombie, and its workers with it
    runner.wait()
    ask(lost)  # Ray needs some more seconds to notice
    eventually(lambda: service.notices("node_lost"), "the loss to be noticed")
    assert len(service.client.status().nodes) == 1
    assert {replica.model for replica in service.replicas()} == {lost}
    assert node_of(cluster, service, lost) is cluster.head_node
    eventually(lambda: not any(doomed.node_id in name for name in names()), "the lost node's actors to be gone")

    newcomer = cluster.add_node(num_cpus=1, object_store_memory=100 * MIB)
    eventually(lambda: len(service.client.status().nodes) == 2, "the new node to join")
    eventually(lambda: has_a_free_gpu("cumbre"), "the new node's files and memory to be known")
    ask("cumbre")
    assert node_of(cluster, service, "cumbre") is newcomer
    service.unload_all()


def names() -> list[str]:
    return [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]
