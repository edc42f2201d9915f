"""One loaded copy of a model, from the decision to load it until its memory is back.

    pending  -> loading            the room promised to it is really free
    pending  -> (forgotten)        the room did not become free, or no request waits for it any longer
    loading  -> ready | stopping   loaded, or failed and being cleaned up
    ready    -> stopping           evicted, unloaded, idle too long, or dead
    stopping -> (forgotten)        its process has ended and its devices have been read again

In any state, a replica is forgotten when its node is lost.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from math import inf

from scheduler.costs.params import ContextParams, Footprint, Layout
from scheduler.errors import InvariantBroken
from scheduler.units import DeviceId, LeaseId, LoadKey, NodeId, ReplicaId


class ReplicaState(str, Enum):
    PENDING = "pending"
    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"


TRANSITIONS: dict[ReplicaState, frozenset[ReplicaState]] = {
    ReplicaState.PENDING: frozenset({ReplicaState.LOADING}),
    ReplicaState.LOADING: frozenset({ReplicaState.READY, ReplicaState.STOPPING}),
    ReplicaState.READY: frozenset({ReplicaState.STOPPING}),
    ReplicaState.STOPPING: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Placement:
    """A layout on concrete devices of a node, with the bytes that it needs there. `layers`: their number per device."""

    tier: str
    node_id: NodeId
    device_ids: tuple[DeviceId, ...]
    layout: Layout
    context: ContextParams
    device_bytes: tuple[int, ...]
    overhead_bytes: tuple[int, ...]  # the part of each that is not llama.cpp's buffers
    host_bytes: int  # the maximum, also during the load
    host_mapped_bytes: int  # the part of host_bytes that is file-backed: MemAvailable never shows it as used
    host_outside_bytes: int  # the part of host_bytes that is not llama.cpp's buffers, and stays
    host_resting_bytes: int  # the part of host_bytes that is anonymous and there before the first request
    computes_on_cpu: bool
    n_layers: int  # layers in all, the output counted as one
    mmproj_bytes: int = 0  # of the projector; a part of the first device's overhead, or of host_outside_bytes
    mmproj_on_device: bool = False  # the projector is on the first device; else in host RAM
    grows: bool = False  # its buffers grow while it serves: its booking is not reduced

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(int(count) for count in self.layout.tensor_split)

    @property
    def n_spilled_experts(self) -> int:
        """Layers on GPUs whose experts are in host RAM."""
        return self.n_layers - 1 if self.layout.experts_on_host else self.layout.n_cpu_moe

    @property
    def n_resident_layers(self) -> int:
        """Layers that are wholly on GPUs."""
        return self.layout.n_gpu_layers - self.n_spilled_experts


@dataclass(slots=True)
class Replica:
    """Mutable state of one replica; only the core changes it. Times are seconds of the core's clock."""

    replica_id: ReplicaId
    model: str
    path: str
    placement: Placement
    slots: int
    n_ctx: int  # per slot
    created_at: float
    last_used_at: float
    state: ReplicaState = ReplicaState.PENDING
    waits_for: frozenset[ReplicaId] = frozenset()  # pending: stopping replicas whose room it will use
    leases: set[LeaseId] = field(default_factory=set)
    drain_for: str = ""  # the waiting model for which it makes room
    drained_at: float = 0.0
    compared_at: float = -inf  # when a better place was last searched
    retiring: str = ""  # why it is stopped when idle, even if requests wait for it
    doubted: bool = False  # it failed a request; no slots are granted until it has been checked
    ready_at: float = 0.0
    load_s: float = 0.0
    pid: int = 0
    progress: float = 0.0
    measured: Footprint | None = None  # llama.cpp's buffers, once loaded
    cached_fraction: float = 0.0  # of its file, in the page cache when it was placed
    load_key: LoadKey | None = None  # under which `measured` is remembered
    room_since: float | None = None  # pending: when the last victim was gone
    preloaded: bool = False  # no request has used it yet
    kept: bool = False  # loaded because the model must always have a replica (min_replicas)
    supersedes: ReplicaId | None = None  # a slower replica of the model, which is stopped when this one is ready
    prefixes: deque[str] = field(default_factory=lambda: deque(maxlen=8))  # of the prompts that it saw last

    def become(self, state: ReplicaState) -> None:
        """Change the state. Raises InvariantBroken for a step that is not in TRANSITIONS."""
        if state not in TRANSITIONS[self.state]:
            raise InvariantBroken(f"replica {self.replica_id}: {self.state.value} cannot become {state.value}")
        self.state = state

    def saw(self, prefix: str) -> None:
        """A prompt with this prefix is now in its cache."""
        if prefix in self.prefixes:
            self.prefixes.remove(prefix)
        self.prefixes.append(prefix)

    @property
    def busy(self) -> bool:
        return bool(self.leases)

    @property
    def idle(self) -> bool:
        return self.state is ReplicaState.READY and not self.leases

    @property
    def removable(self) -> bool:
        """It may be stopped for another model: it is idle, or it is being preloaded without a request."""
        return self.idle or (self.state is ReplicaState.LOADING and self.preloaded)

    @property
    def open(self) -> bool:
        """It accepts requests, or will when it is ready."""
        return self.state is not ReplicaState.STOPPING and not self.drain_for and not self.retiring

    @property
    def free_slots(self) -> int:
        if self.state is not ReplicaState.READY or self.drain_for or self.retiring or self.doubted:
            return 0
        return max(0, self.slots - len(self.leases))  # after a restart, there may be more leases than slots

    @property
    def anonymous_bytes(self) -> int:
        """The part of its predicted host RAM that is not file-backed."""
        return self.placement.host_bytes - self.placement.host_mapped_bytes
