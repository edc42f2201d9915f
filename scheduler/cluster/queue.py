"""The bounded queue of requests that wait for a slot. Each model has a line of its own.

The lines are ordered by their first requests. A line is ordered by rank, in seconds of the core's clock, the lowest
first:

    rank = arrived_at - priority x priority_s + requests of the same key that wait already x fair_share_s

So waiting raises the place of a request. A request of priority p is overtaken only by requests that come within
(p' - p) x priority_s seconds after it. No request starves. If a key sends many requests at once, requests of other keys
go between them. Without keys and priorities, the order is first come, first served.
"""

from __future__ import annotations

from bisect import bisect, insort
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Literal

from scheduler.config import Policy
from scheduler.errors import QueueFull, Rejected
from scheduler.units import ReplicaId, RequestId

RequestKind = Literal["generate", "embed", "load"]
_SEEN_LEAVING = 16  # the last requests that left; they show how fast the queue moves
_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 1.0, 120.0


@dataclass(slots=True, eq=False)
class Waiting:
    """One request in the queue. `reason` says what it waits for; times are seconds of the core's clock."""

    request_id: RequestId
    model: str
    kind: RequestKind
    n_ctx: int | None  # tokens the slot must hold; None: the model's default
    arrived_at: float
    deadline_at: float
    priority: int = 0
    key: str = ""  # the name of the request's API key; empty: none
    prefix: str = ""  # hash of the beginning of its prompt; empty: not known
    fingerprint: str = ""  # hash of the whole request; empty: not known
    rank: float = 0.0
    reason: str = ""
    in_the_way: frozenset[ReplicaId] = frozenset()  # replicas that it waits for
    looked_at_epoch: int = -1  # the facts for which no place was found
    look_again_at: float = -inf  # when a place is searched again although the facts are the same


class RequestQueue:
    """A model's line never delays another model's line."""

    def __init__(self, policy: Policy) -> None:
        self._limit = policy.queue_limit
        self._priority_s = policy.priority_s
        self._fair_share_s = policy.fair_share_s
        self._lines: dict[str, list[Waiting]] = {}
        self._by_id: dict[RequestId, Waiting] = {}
        self._of_key: Counter[str] = Counter()
        self._heads: list[Waiting] | None = []  # None: they have changed
        self._left_at: deque[float] = deque(maxlen=_SEEN_LEAVING)

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._by_id

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._by_id.values())

    def add(self, waiting: Waiting) -> Waiting | None:
        """Put the request in its line. If the queue is full, it replaces another request, which is returned.

        That is the last request of the key with the most, if this key has more than the newcomer's key would have.
        Otherwise it is the last request of the newcomer's own key with a lower priority. Raises QueueFull, and Rejected
        for an id that is already waiting.
        """
        if waiting.request_id in self._by_id:
            raise Rejected(f"request {waiting.request_id} is waiting already")
        displaced = self.displaced_by(waiting)
        if displaced is not None:
            self.remove(displaced.request_id)
        waiting.rank = self.rank(waiting)
        self._by_id[waiting.request_id] = waiting
        self._of_key[waiting.key] += 1
        line = self._lines.setdefault(waiting.model, [])
        insort(line, waiting, key=_rank)
        if line[0] is waiting:
            self._heads = None
        return displaced

    def rank(self, newcomer: Waiting) -> float:
        """The rank that the request would get now."""
        ahead = self._of_key[newcomer.key] if newcomer.key else 0
        return newcomer.arrived_at - newcomer.priority * self._priority_s + ahead * self._fair_share_s

    def displaced_by(self, newcomer: Waiting) -> Waiting | None:
        """The request that would have to leave for the newcomer; None if the queue has room. Raises QueueFull."""
        if len(self) < self._limit:
            return None
        key, most = max(self._of_key.items(), key=lambda each: each[1])
        there = [each for each in self if each.key == key]
        if key == newcomer.key or most <= self._of_key[newcomer.key] + 1:
            there = [each for each in self if each.key == newcomer.key and each.priority < newcomer.priority]
        if not there:
            raise self.full()
        return max(there, key=_rank)

    def full(self) -> QueueFull:
        """The error for a request for which the queue has no room."""
        retry_s = self.seconds_per_place()
        return QueueFull(
            f"{self._limit} requests are waiting already; about every {retry_s:.0f} s, one of them leaves the queue",
            retry_after_s=retry_s,
        )

    def seconds_per_place(self) -> float:
        """The mean time between two requests that leave, from the last ones that left."""
        span_s = self._left_at[-1] - self._left_at[0] if self._left_at else 0.0
        return min(_LONGEST_RETRY_S, max(_SHORTEST_RETRY_S, span_s / max(1, len(self._left_at) - 1)))

    def heads(self) -> list[Waiting]:
        """The first request of each model, in their order. Not to be changed."""
        if self._heads is None:
            self._heads = sorted((line[0] for line in self._lines.values()), key=_rank)
        return self._heads

    def before(self, waiting: Waiting) -> int:
        """How many requests of its line are before the request, or would be if it came now."""
        line = self._lines.get(waiting.model, [])
        return line.index(waiting) if waiting.request_id in self._by_id else bisect(line, waiting.rank, key=_rank)

    def of_model(self, model: str) -> tuple[Waiting, ...]:
        return tuple(self._lines.get(model, ()))

    def length(self, model: str) -> int:
        return len(self._lines.get(model, ()))

    def head(self, model: str) -> Waiting | None:
        line = self._lines.get(model)
        return line[0] if line else None

    def remove(self, request_id: RequestId) -> Waiting | None:
        waiting = self._by_id.pop(request_id, None)
        if waiting is not None:
            line = self._lines[waiting.model]
            if line[0] is waiting:
                self._heads = None
            line.remove(waiting)
            if not line:
                del self._lines[waiting.model]
            self._of_key[waiting.key] -= 1
            if not self._of_key[waiting.key]:
                del self._of_key[waiting.key]
        return waiting

    def served(self, waiting: Waiting, now: float) -> None:
        """The request has a slot: it leaves the queue."""
        self.remove(waiting.request_id)
        self._left_at.append(now)
        if not self._by_id:  # the time with an empty queue says nothing about its speed
            self._left_at.clear()

    def expired(self, now: float) -> list[Waiting]:
        return [entry for entry in self if now >= entry.deadline_at]


def _rank(waiting: Waiting) -> float:
    return waiting.rank
