"""Books of its own on what the core was told and said, and every invariant that they must hold."""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.soak.stage import SELDOM, Tally, Violation
from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.cluster.ledger import STATES
from scheduler.cluster.replica import Replica, ReplicaState
from scheduler.core import SchedulerCore
from scheduler.units import LeaseId, ReplicaId, RequestId

ENTRY = {
    ReplicaState.PENDING: "promised",
    ReplicaState.LOADING: "held",
    ReplicaState.READY: "held",
    ReplicaState.STOPPING: "releasing",
}


class Referee:
    """Knows from events and commands alone who waits and who holds which lease, and looks into the core to compare."""

    def __init__(self, core: SchedulerCore, tally: Tally) -> None:
        self.core = core
        self.tally = tally
        self.queued: dict[RequestId, ev.RequestArrived] = {}
        self.leases: dict[LeaseId, tuple[RequestId, ReplicaId]] = {}
        self.of_request: dict[RequestId, LeaseId] = {}
        self.on_replica: defaultdict[ReplicaId, set[LeaseId]] = defaultdict(set)
        self._checks = 0

    # ------------------------------------------------------------------ before and after an event

    def before(self, event: ev.Event) -> None:
        """What the event itself says, whatever the core makes of it."""
        match event:
            case ev.RequestArrived():
                self.queued[event.request_id] = event
            case ev.RequestCancelled():
                if self.queued.pop(event.request_id, None) is None and event.request_id in self.of_request:
                    self._end(self.of_request[event.request_id])
            case ev.LeaseReleased():
                if event.lease_id in self.leases:
                    self._end(event.lease_id)
            case ev.NodeLost():
                for replica in self.core.replicas.on_node(event.node_id):
                    self._void(replica.replica_id)
            case _:
                pass

    def after(self, event: ev.Event, commands: Sequence[cmd.Command]) -> None:
        if isinstance(event, ev.ReplicaAdopted) and event.replica_id in self.core.replicas:
            for lease_id in event.lease_ids:
                self._begin(lease_id, RequestId(lease_id), event.replica_id)
        for command in commands:
            match command:
                case cmd.GrantLease():
                    self._granted(command)
                case cmd.RefuseRequest():
                    if self.queued.pop(command.request_id, None) is None:
                        raise Violation(f"{command.request_id} is refused, and does not wait: {command.error}")
                    self.tally.refused[command.error.code] += 1
                case cmd.CancelAnswer():
                    if self.leases.get(command.lease_id, ("", ""))[1] != command.replica_id:
                        raise Violation(f"{command.lease_id} is taken back, and was not there")
                    self._end(command.lease_id)
                case cmd.StopReplica():
                    self._stopped(event, command)
                case cmd.StartReplica():
                    self._started(command)
                case cmd.Announce():
                    self._announced(command)
                case _:
                    pass

    def _granted(self, grant: cmd.GrantLease) -> None:
        asked = self.queued.pop(grant.request_id, None)
        if asked is None:
            raise Violation(f"{grant.request_id} is granted a slot, and does not wait")
        if asked.model != grant.model or grant.n_ctx < (asked.n_ctx or 0):
            raise Violation(f"{asked} was granted {grant}")
        self._begin(grant.lease_id, grant.request_id, grant.replica_id)
        self.tally.grants += 1
        self._sum(f"{grant.lease_id} {grant.replica_id}")

    def _stopped(self, event: ev.Event, stop: cmd.StopReplica) -> None:
        self._sum(f"stop {stop.replica_id}")
        left = self.on_replica.get(stop.replica_id)
        if left:
            lost = isinstance(event, ev.DeviceSampled) and event.reading.lost_reason
            died = isinstance(event, (ev.ReplicaDied, ev.ReplicaGone)) and event.replica_id == stop.replica_id
            if not lost and not died:
                raise Violation(f"{stop.replica_id} is stopped ({stop.reason}) under {sorted(left)}")
            self._void(stop.replica_id)
        replica = self.core.replicas.get(stop.replica_id)
        if replica is None:
            if not isinstance(event, ev.ReplicaAdopted):
                raise Violation(f"{stop.replica_id} is stopped, and is not there")
            return
        _, _, claimant = stop.reason.partition("evicted for ")
        if (claimant and claimant != replica.model) or stop.reason == "idle":
            self._may_go(replica, stop.reason)

    def _may_go(self, replica: Replica, reason: str) -> None:
        model = self.core.models.by_name.get(replica.model)
        if model is None:
            return
        if model.pinned:
            raise Violation(f"{replica.replica_id} is pinned, and stopped: {reason}")
        least = self.core.models.params(model).min_replicas or 0
        left = sum(other.open for other in self.core.replicas.of_model(replica.model))
        if left < least:
            raise Violation(f"{replica.replica_id} is stopped ({reason}): {left} of {least} are left")

    def _started(self, start: cmd.StartReplica) -> None:
        self._sum(f"start {start.replica_id} {start.placement.device_ids} {start.placement.device_bytes}")
        self.tally.cold_loads += 1
        self.tally.tiers[start.placement.tier] += 1
        self.tally.prefetches += self.core.replicas[start.replica_id].preloaded

    def _announced(self, notice: cmd.Announce) -> None:
        self.tally.evictions += notice.kind == "replica_evicted"
        self.tally.preemptions += notice.kind == "replica_preempted"
        self.tally.moves += notice.kind == "replica_moved"

    def _begin(self, lease_id: LeaseId, request_id: RequestId, replica_id: ReplicaId) -> None:
        if lease_id in self.leases:
            raise Violation(f"{lease_id} is granted twice")
        self.leases[lease_id] = request_id, replica_id
        self.of_request[request_id] = lease_id
        self.on_replica[replica_id].add(lease_id)

    def _end(self, lease_id: LeaseId) -> None:
        request_id, replica_id = self.leases.pop(lease_id)
        del self.of_request[request_id]
        self.on_replica[replica_id].discard(lease_id)
        if not self.on_replica[replica_id]:
            del self.on_replica[replica_id]

    def _void(self, replica_id: ReplicaId) -> None:
        for lease_id in list(self.on_replica.get(replica_id, ())):
            self._end(lease_id)

    def _sum(self, text: str) -> None:
        self.tally.checksum = zlib.crc32(text.encode(), self.tally.checksum)

    # ------------------------------------------------------------------ what must hold

    def check(self, event: ev.Event, now: float) -> None:
        core = self.core
        core.ledger.check()
        core.rooms.check()
        leases = 0
        for replica in core.replicas.values():
            if core.ledger.state(replica.replica_id) != ENTRY[replica.state]:
                raise Violation(f"{replica.replica_id}: {replica.state}, {core.ledger.state(replica.replica_id)}")
            if replica.leases:
                leases += len(replica.leases)
                if len(replica.leases) > replica.slots or replica.state is not ReplicaState.READY:
                    raise Violation(f"{replica.replica_id}: {len(replica.leases)} leases, {replica.state}")
        if not leases == len(core.fleet.leases) == len(self.leases):
            raise Violation(f"{leases} leases on replicas, {len(core.fleet.leases)} in all, {len(self.leases)} known")
        if len(core.queue) != len(self.queued):
            raise Violation(f"{len(core.queue)} in the queue, of {len(self.queued)} who wait")
        if isinstance(event, ev.Ticked) and (late := core.queue.expired(now)):
            raise Violation(f"{late[0]} waits beyond its deadline")
        self._checks += 1
        if self._checks % SELDOM == 0:
            self.check_all()

    def check_all(self) -> None:
        """Everything of which the core keeps a second copy, made anew."""
        core = self.core
        if {waiting.request_id for waiting in core.queue} != self.queued.keys():
            raise Violation("others are in the queue than those who wait")
        if {lease.lease_id: lease.replica_id for lease in core.fleet.leases.all()} != {
            lease_id: replica_id for lease_id, (_, replica_id) in self.leases.items()
        }:
            raise Violation("other leases are kept than were granted")
        if {lease_id for replica in core.replicas.values() for lease_id in replica.leases} != self.leases.keys():
            raise Violation("replicas have other leases than were granted")
        self._check_queue()
        self._check_replicas()

    def _check_queue(self) -> None:
        queue = self.core.queue
        lines: defaultdict[str, list[Any]] = defaultdict(list)
        for waiting in queue:
            lines[waiting.model].append(waiting)
        for model, line in lines.items():
            kept = queue.of_model(model)
            if sorted(map(id, kept)) != sorted(map(id, line)) or any(
                one.rank > other.rank for one, other in pairwise(kept)
            ):
                raise Violation(f"the line of {model} is not that of the queue")
        heads = queue.heads()
        firsts = {queue.of_model(model)[0] for model in lines}
        if firsts != set(heads) or any(one.rank > other.rank for one, other in pairwise(heads)):
            raise Violation("the heads of the queue's lines are not those of its requests")
        if queue._of_key != Counter(waiting.key for waiting in queue):
            raise Violation("the queue's keys are not those of its requests")

    def _check_replicas(self) -> None:
        replicas = self.core.replicas
        every = dict(replicas)
        views: tuple[tuple[Mapping[Any, Collection[Replica]], Callable[[Replica], Any]], ...] = (
            (replicas._of_model, lambda replica: replica.model),
            (replicas._on_node, lambda replica: replica.placement.node_id),
            ({state: each.values() for state, each in replicas._in_state.items()}, lambda replica: replica.state),
        )
        for view, key in views:
            kept = sorted((str(k), replica.replica_id) for k, each in view.items() for replica in each)
            anew = sorted((str(key(replica)), replica_id) for replica_id, replica in every.items())
            if kept != anew:
                raise Violation(f"a view of the replicas is stale: {kept} is kept, {anew} is true")
        if replicas._by_use != every:
            raise Violation("replicas by use are not all of them")
        draining = {replica_id for replica_id, replica in every.items() if replica.drain_for}
        if not draining <= self.core._dispatch._draining._replicas.keys():
            raise Violation(f"{draining} drain, and nobody remembers")
        retiring = {replica_id for replica_id, replica in every.items() if replica.retiring}
        if retiring != self.core.fleet._retiring.keys():
            raise Violation(f"{retiring} retire, {list(self.core.fleet._retiring)} are remembered")

    def check_empty(self) -> None:
        """After the last request has ended and everything was unloaded."""
        core = self.core
        left = {
            "requests": len(core.queue),
            "leases": len(core.fleet.leases),
            "replicas": list(core.replicas),
            "draining": list(core._dispatch._draining._replicas),
            "retiring": list(core.fleet._retiring),
            "read ahead": core._dispatch._disks._ahead,
            "bookings": {
                account: core.ledger.booked(account, *STATES)
                for account in core.ledger.accounts()
                if core.ledger.booked(account, *STATES)
            },
            "entries": list(core.ledger._entries),
        }
        if any(left.values()):
            raise Violation(f"left at the end: { {what: there for what, there in left.items() if there} }")
        self.check_all()
