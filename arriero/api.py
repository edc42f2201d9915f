"""The types of the public API: everything that the clients and `/api/v1` take, give and raise."""

from __future__ import annotations

from actors.gateway.address import DEFAULT_PORT
from actors.gateway.errors import BodyTooLarge, Forbidden, NoSuchRoute, Unauthorized
from actors.records import (
    AdapterInfo,
    Answer,
    Embeddings,
    GpuStatus,
    Health,
    LayoutShare,
    LoadRequest,
    LoadResult,
    ModelInfo,
    NodeStatus,
    Notice,
    PinRequest,
    PinResult,
    Plan,
    PlanCost,
    PlanOption,
    PlanPace,
    PlanShare,
    PlanSpeed,
    PlanVictim,
    QueueEntry,
    RejectedCandidate,
    ReplicaStatus,
    Status,
    UnloadRequest,
    UnloadResult,
    Usage,
)
from arriero.calls import Options
from scheduler.errors import (
    ArrieroError,
    DeadlineExceeded,
    EngineFailed,
    Impossible,
    InvalidGGUF,
    InvariantBroken,
    QueueFull,
    Rejected,
    Unavailable,
    UnknownModel,
)

__all__ = [
    "DEFAULT_PORT",
    "Options",
    # answers
    "Answer",
    "Embeddings",
    "Usage",
    # status
    "Status",
    "NodeStatus",
    "GpuStatus",
    "ReplicaStatus",
    "LayoutShare",
    "QueueEntry",
    "ModelInfo",
    "AdapterInfo",
    "Health",
    "Notice",
    # plan
    "Plan",
    "PlanShare",
    "PlanSpeed",
    "PlanPace",
    "PlanCost",
    "PlanOption",
    "PlanVictim",
    "RejectedCandidate",
    # orders
    "LoadRequest",
    "LoadResult",
    "UnloadRequest",
    "UnloadResult",
    "PinRequest",
    "PinResult",
    # errors
    "ArrieroError",
    "Rejected",
    "UnknownModel",
    "InvalidGGUF",
    "Impossible",
    "Unauthorized",
    "Forbidden",
    "NoSuchRoute",
    "BodyTooLarge",
    "Unavailable",
    "QueueFull",
    "DeadlineExceeded",
    "EngineFailed",
    "InvariantBroken",
]
