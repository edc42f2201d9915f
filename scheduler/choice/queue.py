"""Requests that wait for a slot: bounded, first come first served per model, models ordered by their oldest request."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Literal

from scheduler.errors import QueueFull, Rejected
from scheduler.units import RequestId

RequestKind = Literal["generate", "embed", "load"]


@dataclass(slots=True, eq=False)
class Waiting:
    """One request in the queue. `reason` says what it waits for; times are seconds of the core's clock."""

    request_id: RequestId
    model: str
    kind: RequestKind
    n_ctx: int | None  # tokens the slot must hold; None: the model's default
    arrived_at: float
    deadline_at: float
    reason: str = ""
    looked_at_epoch: int = -1  # the facts for which no place was found, and when
    looked_at: float = -inf


class RequestQueue:
    """FIFO per model. A model's queue never holds up another model's."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_model: dict[str, deque[Waiting]] = {}
        self._by_id: dict[RequestId, Waiting] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._by_id.values())

    def add(self, waiting: Waiting) -> None:
        """Append. Raises QueueFull, and Rejected for an id that is waiting already."""
        if waiting.request_id in self._by_id:
            raise Rejected(f"request {waiting.request_id} is waiting already")
        if len(self) >= self._limit:
            raise QueueFull(f"{self._limit} requests are waiting already; try again in a while", retry_after_s=2.0)
        self._by_id[waiting.request_id] = waiting
        self._by_model.setdefault(waiting.model, deque()).append(waiting)

    def models(self) -> list[str]:
        """Models that somebody waits for, the longest wait first."""
        return sorted(self._by_model, key=lambda model: self._by_model[model][0].arrived_at)

    def of_model(self, model: str) -> tuple[Waiting, ...]:
        return tuple(self._by_model.get(model, ()))

    def head(self, model: str) -> Waiting | None:
        waiting = self._by_model.get(model)
        return waiting[0] if waiting else None

    def remove(self, request_id: RequestId) -> Waiting | None:
        waiting = self._by_id.pop(request_id, None)
        if waiting is not None:
            line = self._by_model[waiting.model]
            line.remove(waiting)
            if not line:
                del self._by_model[waiting.model]
        return waiting

    def expired(self, now: float) -> list[Waiting]:
        return [entry for entry in self if now >= entry.deadline_at]
