"""What to do. Frozen, picklable records; each one that acts on a runner or a file ends in one event, or with its node.

StartReplica  -> ReplicaReady | ReplicaFailed         StopReplica -> ReplicaGone
ReadShape     -> ShapeRead                            CheckReplica -> ReplicaVouched | ReplicaDied
ReadAhead     -> ReadAheadEnded
CancelAnswer, StopReadAhead -> (take effect at the runner's next turn)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Union

from scheduler.cluster.replica import Placement
from scheduler.costs.measurements import Record
from scheduler.costs.params import MOST_DRAFTED
from scheduler.entry_parts import VectorSizes
from scheduler.errors import ArrieroError
from scheduler.units import LeaseId, NodeId, ReplicaId, RequestId


@dataclass(frozen=True, slots=True)
class StartReplica:
    replica_id: ReplicaId
    model: str
    path: str
    placement: Placement
    use_mmap: bool
    use_extra_bufts: bool
    preflight: bool = False  # ask llama.cpp first what it would allocate
    chat_template: str = ""  # in place of the file's
    adapters: tuple[tuple[str, str, float], ...] = ()  # name, path and scale of each
    mmproj: str = ""
    matryoshka_dimensions: VectorSizes = ()  # that its embeddings may be cut to
    draft: tuple[str, int, float] = ("", MOST_DRAFTED, 0.0)  # path, tokens at once, and how likely they must be


@dataclass(frozen=True, slots=True)
class StopReplica:
    """`saves`: its conversations are saved before; it works, as far as is known."""

    replica_id: ReplicaId
    node_id: NodeId
    reason: str
    saves: bool = False


@dataclass(frozen=True, slots=True)
class CheckReplica:
    """Find out whether a replica that failed a request still serves."""

    replica_id: ReplicaId


@dataclass(frozen=True, slots=True)
class CancelAnswer:
    """Nobody reads the answer any more that this lease was for; the slot is given to others."""

    replica_id: ReplicaId
    lease_id: LeaseId


@dataclass(frozen=True, slots=True)
class ReadShape:
    """Read the header of a model, and of the files that come with it: `adapters` in the catalogue's order, `mmproj`,
    `draft` (the model's own path: its prediction layers)."""

    node_id: NodeId
    path: str
    adapters: tuple[str, ...] = ()
    mmproj: str = ""
    draft: str = ""


@dataclass(frozen=True, slots=True)
class ReadAhead:
    """Read a model's file into the page cache, while the disk has nothing else to do."""

    node_id: NodeId
    path: str


@dataclass(frozen=True, slots=True)
class StopReadAhead:
    node_id: NodeId
    path: str


@dataclass(frozen=True, slots=True)
class Remember:
    """Keep what was measured, for after a restart."""

    record: Record


@dataclass(frozen=True, slots=True)
class GrantLease:
    request_id: RequestId
    lease_id: LeaseId
    replica_id: ReplicaId
    model: str
    n_ctx: int
    ttl_s: float


@dataclass(frozen=True, slots=True)
class RefuseRequest:
    request_id: RequestId
    error: ArrieroError


@dataclass(frozen=True, slots=True)
class Announce:
    """Something people and monitors want to know. `kind` is a stable name, listed in docs/events.md."""

    kind: str
    message: str
    model: str = ""
    replica_id: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


Command = Union[  # noqa: UP007
    StartReplica,
    StopReplica,
    CheckReplica,
    CancelAnswer,
    ReadShape,
    ReadAhead,
    StopReadAhead,
    Remember,
    GrantLease,
    RefuseRequest,
    Announce,
]
