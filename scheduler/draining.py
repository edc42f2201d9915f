"""Models that do not fit together take turns: busy replicas in somebody's way finish what they do, and nothing new.

A replica serves for some time before that, so that each swap serves many requests of one model, and no longer than
that, so that nobody waits for ever. Where the user allows it, a request of higher priority need not wait for its turn.
"""

from __future__ import annotations

from collections.abc import Iterator

from scheduler.cluster.leases import Lease
from scheduler.cluster.queue import RequestQueue, Waiting
from scheduler.cluster.replica import Replica
from scheduler.fleet import Fleet
from scheduler.outbox import Outbox
from scheduler.units import ReplicaId

LOAD_TIMES_BEFORE_DRAIN = 3.0  # a replica serves for so many times its load time before others may drain it,
LONGEST_TURN_S = 60.0  # but not longer than this (or the minimum residency)


class Draining:
    """Draining replicas, by what they make room for. `Replica.drain_for` is changed here only."""

    def __init__(self, queue: RequestQueue, fleet: Fleet, outbox: Outbox) -> None:
        self._queue = queue
        self._fleet = fleet
        self._policy = fleet.policy
        self._out = outbox
        self._replicas: dict[ReplicaId, Replica] = {}

    def __len__(self) -> int:
        return len(self._replicas)

    def reopen_unwanted(self) -> list[Replica]:
        """Those for whom nobody waits any more take requests again."""
        replicas = self._fleet.replicas
        return [
            self._reopen(replica)
            for replica in list(self._replicas.values())
            if replica.replica_id not in replicas or not self._queue.length(replica.drain_for)
        ]

    def drain(self, head: Waiting, victims: frozenset[ReplicaId], now: float) -> list[Replica]:
        """Let those `victims` that have served long enough take nothing new until they have made room; others that
        were to make room for this request are open again, and returned."""
        if not victims and not self._replicas:
            return []
        reopened = [
            self._reopen(replica)
            for replica in list(self._replicas.values())
            if replica.drain_for == head.model and replica.replica_id not in victims
        ]
        ours = self._fleet.replicas.of_model(head.model)
        if any(replica.drain_for not in ("", head.model) for replica in ours):
            return reopened  # it makes room for somebody itself: two that wait for each other would wait for ever
        for replica_id in sorted(victims & self._fleet.replicas.keys()):
            replica = self._fleet.replicas[replica_id]
            turn_s = 0.0 if self._may_preempt(head, replica) else self._turn_s(replica)
            if replica.busy and not replica.drain_for and now - replica.ready_at >= turn_s:
                replica.drain_for, replica.drained_at = head.model, now
                self._replicas[replica_id] = replica
                message = f"{replica.model} accepts no new requests, to make room for {head.model}"
                self._out.announce("replica_draining", message, replica=replica)
        return reopened

    def drain_who_is_due(self, now: float) -> list[Replica]:
        """For everybody who has waited long enough for busy replicas. Returns those that are open again."""
        reopened = []
        for head in self._queue.heads():
            if head.in_the_way and now - head.arrived_at >= self._policy.drain_after_s:
                reopened += self.drain(head, head.in_the_way, now)
        return reopened

    def preempted(self, now: float) -> Iterator[Lease]:
        """Leases to be taken back: of draining replicas that take too long for somebody of higher priority."""
        after_s = self._policy.preempt_after_s
        for replica in list(self._replicas.values()) if after_s is not None else ():
            head = self._queue.head(replica.drain_for)
            late = head is not None and now - replica.drained_at >= (after_s or 0.0)
            if head is not None and late and replica.busy and self._may_preempt(head, replica):
                what = f"{len(replica.leases)} answers to make room for {head.model} (priority {head.priority})"
                self._out.announce("replica_preempted", f"{replica.model} ends {what}", replica=replica)
                yield from self._fleet.leases.of(replica)

    def _may_preempt(self, head: Waiting, replica: Replica) -> bool:
        """Whether the user allows it, and the replica serves nobody of the same priority or a higher one."""
        if self._policy.preempt_after_s is None:
            return False
        return all(lease.priority < head.priority for lease in self._fleet.leases.of(replica))

    def _turn_s(self, replica: Replica) -> float:
        return max(self._policy.min_residency_s, min(LOAD_TIMES_BEFORE_DRAIN * replica.load_s, LONGEST_TURN_S))

    def _reopen(self, replica: Replica) -> Replica:
        replica.drain_for = ""
        del self._replicas[replica.replica_id]
        return replica
