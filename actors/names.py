"""How Arriero's actors are found: one namespace, one name each."""

from __future__ import annotations

from scheduler.units import DeviceId, NodeId, ReplicaId

NAMESPACE = "arriero"
SCHEDULER = "scheduler"
GATEWAY = "gateway"
RUNNER_PREFIX = "runner-"
NODE_PREFIX = "node-"
GPU_PREFIX = "gpu-"


def runner_name(replica_id: ReplicaId) -> str:
    return f"{RUNNER_PREFIX}{replica_id}"


def node_name(node_id: NodeId) -> str:
    return f"{NODE_PREFIX}{node_id}"


def gpu_name(device_id: DeviceId) -> str:
    return f"{GPU_PREFIX}{device_id}"
