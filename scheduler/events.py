"""What happened. Frozen, picklable records; every change of the core's state begins with one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Union

from scheduler.cluster.facts import DeviceReading, NodeFacts, NodeReading
from scheduler.cluster.leases import Ending
from scheduler.cluster.queue import RequestKind
from scheduler.cluster.replica import Placement
from scheduler.costs.paces import Pace
from scheduler.costs.params import Footprint
from scheduler.costs.shape import ModelShape
from scheduler.units import LeaseId, NodeId, ReplicaId, RequestId

FailureKind = Literal["refused", "underestimated", "out_of_memory", "invalid_model", "crashed", "failed"]


@dataclass(frozen=True, slots=True)
class NodeJoined:
    facts: NodeFacts


@dataclass(frozen=True, slots=True)
class NodeSampled:
    reading: NodeReading


@dataclass(frozen=True, slots=True)
class NodeLost:
    node_id: NodeId
    reason: str


@dataclass(frozen=True, slots=True)
class DeviceSampled:
    reading: DeviceReading


@dataclass(frozen=True, slots=True)
class ShapeRead:
    """A header was read: `shape`, or why the file is `invalid`, or the `trouble` that kept it from being read.

    `adapters`, `mmproj` and `draft` came with it: the shape is that of all together.
    """

    node_id: NodeId
    path: str
    shape: ModelShape | None
    invalid: str = ""
    trouble: str = ""  # it is tried again
    adapters: tuple[str, ...] = ()
    mmproj: str = ""
    draft: str = ""


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """Somebody wants a slot of `model` with at least `n_ctx` tokens (None: the model's default).

    `priority` None: the model's. `key`: the name of the API key that it came with. `prefix`: a hash of what its prompt
    begins with; a replica that has seen the same answers sooner. `fingerprint`: a hash of all that is asked; a request
    under which runners end is known by it when it comes again.
    """

    request_id: RequestId
    model: str
    kind: RequestKind = "generate"
    n_ctx: int | None = None
    deadline_s: float | None = None  # from now
    priority: int | None = None
    key: str = ""
    prefix: str = ""
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class RequestCancelled:
    request_id: RequestId


@dataclass(frozen=True, slots=True)
class LeaseReleased:
    lease_id: LeaseId
    ending: Ending = "served"
    pace: Pace | None = None  # how fast it was, if that was seen


@dataclass(frozen=True, slots=True)
class LeasesRenewed:
    lease_ids: tuple[LeaseId, ...]


@dataclass(frozen=True, slots=True)
class ClientsLost:
    """The gateway has started anew: nobody waits any more for what the one before had asked for."""


@dataclass(frozen=True, slots=True)
class ReplicaStarted:
    """The replica's process runs and is about to load: from now on readings tell which memory is its own."""

    replica_id: ReplicaId
    pid: int


@dataclass(frozen=True, slots=True)
class ReplicaProgressed:
    replica_id: ReplicaId
    fraction: float


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """Loaded. `buffers` is llama.cpp's own report, its devices parallel to the placement's."""

    replica_id: ReplicaId
    pid: int
    buffers: Footprint
    n_ctx: int  # per slot
    load_s: float


@dataclass(frozen=True, slots=True)
class ReplicaFailed:
    """A load that did not happen; its runner still has to be cleaned up.

    `buffers`: what llama.cpp would allocate, of a load that was "underestimated".
    """

    replica_id: ReplicaId
    kind: FailureKind
    message: str
    buffers: Footprint | None = None


@dataclass(frozen=True, slots=True)
class ReplicaDied:
    """A ready replica's process ended, or it can serve no longer. `by_itself`: nobody ended it, so that a request which
    it was answering may be what it died of."""

    replica_id: ReplicaId
    reason: str
    by_itself: bool = True


@dataclass(frozen=True, slots=True)
class ReplicaVouched:
    """A replica that had failed a request serves after all."""

    replica_id: ReplicaId


@dataclass(frozen=True, slots=True)
class ReplicaGone:
    """The process is gone and the devices have been read again since."""

    replica_id: ReplicaId


@dataclass(frozen=True, slots=True)
class ReplicaAdopted:
    """A runner that outlived a restart of the scheduler, still serving."""

    replica_id: ReplicaId
    model: str
    path: str
    placement: Placement
    ready: ReplicaReady
    lease_ids: tuple[LeaseId, ...] = ()  # of the answers under way


@dataclass(frozen=True, slots=True)
class ReadAheadEnded:
    """A file has been read into the page cache, or as much of it as was read before that was stopped."""

    node_id: NodeId
    path: str


@dataclass(frozen=True, slots=True)
class UnloadAsked:
    """Stop the model's replicas: idle ones at once, busy ones when their requests have ended. Refuse those who wait.
    `unless_wanted`: only replicas that nobody uses, and only while nobody waits."""

    model: str
    unless_wanted: bool = False


@dataclass(frozen=True, slots=True)
class PinAsked:
    model: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class KeepAliveAsked:
    """The model is stopped after being idle for so long, until somebody asks otherwise. A negative time pins it."""

    model: str
    keep_alive_s: float


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed: look at deadlines, leases, idle replicas."""


Event = Union[  # noqa: UP007  (a runtime value on Python 3.10 too)
    NodeJoined,
    NodeSampled,
    NodeLost,
    DeviceSampled,
    ShapeRead,
    RequestArrived,
    RequestCancelled,
    LeaseReleased,
    LeasesRenewed,
    ClientsLost,
    ReplicaStarted,
    ReplicaProgressed,
    ReplicaReady,
    ReplicaFailed,
    ReplicaDied,
    ReplicaVouched,
    ReplicaGone,
    ReplicaAdopted,
    ReadAheadEnded,
    UnloadAsked,
    PinAsked,
    KeepAliveAsked,
    Ticked,
]
