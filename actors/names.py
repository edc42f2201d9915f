"""How Arriero's actors are found: one namespace, one name each."""

from __future__ import annotations

from scheduler.units import DeviceId, NodeId

NAMESPACE = "arriero"
SCHEDULER = "scheduler"
GATEWAY = "gateway"
RUNNER_PREFIX = "runner-"
NODE_PREFIX = "node-"
GPU_PREFIX = "gpu-"


def runner_name(token: str) -> str:
    """`token` is any string of its own: a runner starts before it is known which replica it will hold."""
    return f"{RUNNER_PREFIX}{token}"


def node_name(node_id: NodeId) -> str:
    return f"{NODE_PREFIX}{node_id}"


def gpu_name(device_id: DeviceId) -> str:
    return f"{GPU_PREFIX}{device_id}"
