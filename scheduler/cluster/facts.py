"""The reports of the machines: facts, which never change, and readings, which do.

A *facts* record is sent once, when a node or device appears. A *reading* is sent whenever its numbers change, at least
every second. `sampled_at_s` is the reporter's wall clock in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from scheduler.costs.params import NO_RATES, DeviceKind, Rates
from scheduler.units import DeviceId, NodeId


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """One GPU, real or virtual. `label` is its name on its node for people ("gpu0")."""

    device_id: DeviceId  # NVML UUID, or "virtual-<node>-<index>"
    node_id: NodeId
    label: str
    product: str
    kind: DeviceKind
    total_bytes: int
    rates: Rates = NO_RATES  # virtual GPUs have none: they compute on their node's CPU
    state_path: str = ""  # virtual GPUs: the shared byte count, a path on the node


@dataclass(frozen=True, slots=True)
class DeviceReading:
    """The state of a GPU now. `processes` maps pid to bytes; None if the driver does not tell."""

    device_id: DeviceId
    total_bytes: int
    free_bytes: int
    used_bytes: int
    sampled_at_s: float
    processes: Mapping[int, int] | None = None
    utilisation: float | None = None  # 0..1
    temperature_c: float | None = None
    lost_reason: str = ""  # why the device cannot be used; empty: it can be used


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A GGUF model on a node: its first file, all parts, and the share of it in the page cache (0..1)."""

    path: str
    paths: tuple[str, ...]
    size_bytes: int
    modified_at_s: float
    cached_fraction: float | None = None


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One machine. Replicas that compute on the CPU share its `physical_cores`."""

    node_id: NodeId
    hostname: str
    address: str
    physical_cores: int
    memory_total_bytes: int
    devices: tuple[DeviceFacts, ...] = ()
    rates: Rates = NO_RATES  # of its CPU and RAM
    disk_bytes_per_s: float = 0.0  # speed of loads from its disk; 0: not known
    labels: Mapping[str, str] = field(default_factory=dict)
    llama_build: str = ""  # release of llama-cpp-python there; measurements are valid for this release only


@dataclass(frozen=True, slots=True)
class NodeReading:
    """The state of a machine now. `memory_available_bytes` is the kernel's MemAvailable, with no reserve subtracted."""

    node_id: NodeId
    memory_available_bytes: int
    sampled_at_s: float
    files: tuple[ModelFile, ...] = field(default=())
