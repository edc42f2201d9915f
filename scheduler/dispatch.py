"""Serves the requests that wait: first free slots, then places for models that have none, the longest wait first.

The ladder (`decide`) says what is to be done for a request. It is carried out here. A decision takes some milliseconds.
It is made again when facts have changed (`look_again`), and once a second while requests wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scheduler import commands as cmd
from scheduler.choice.admission import Admission
from scheduler.choice.eviction import Victims
from scheduler.choice.explain import explain_coming
from scheduler.choice.offer import Offer
from scheduler.choice.placement import Choice
from scheduler.choice.price import Prices
from scheduler.choosers import Choosers
from scheduler.cluster.inventory import Inventory
from scheduler.cluster.leases import Ending, Lease
from scheduler.cluster.models import Model, Models
from scheduler.cluster.queue import RequestQueue, Waiting
from scheduler.cluster.replica import Replica, ReplicaState
from scheduler.decide import Ladder, Move, NoRoom, Place, Refuse, Serve, Wait, WithoutSlot
from scheduler.disks import Disks
from scheduler.draining import Draining
from scheduler.errors import ArrieroError, DeadlineExceeded, Unavailable
from scheduler.fleet import Fleet
from scheduler.forecast import Forecast
from scheduler.outbox import Outbox
from scheduler.prefetch import Prefetch
from scheduler.refusals import Refusals
from scheduler.replication import Replication
from scheduler.units import LeaseId, NodeId

MOST_DECISIONS = 8  # per event, the longest waits first: with dozens of models waiting, the others' turn comes later
LOOK_AGAIN_S = 1.0  # a request for which no place was found is looked at again after so long, facts changed or not,
LOOK_AGAIN_SHARE = 0.1  # or after so much of the time that it had waited


@dataclass(frozen=True, slots=True)
class Preview:
    """Either the replica that serves (or will serve) the request, or the choice that would be made.

    `options` are what could be had now, best first: (placement, victims) of each kind, the chosen one included; with a
    busy replica, where another one could be. `reason`: what the request would wait for, or empty.
    """

    serving: Replica | None
    choice: Choice | None
    options: tuple[Offer, ...] = ()
    reason: str = ""


class Dispatch:
    """Between the queue and the fleet. Belongs to the core, which calls `serve` after every event."""

    def __init__(
        self,
        queue: RequestQueue,
        fleet: Fleet,
        admission: Admission,
        inventory: Inventory,
        models: Models,
        outbox: Outbox,
        prices: Prices,
    ) -> None:
        choosers = Choosers(fleet, admission, inventory, models, prices)
        self._choosers = choosers
        self._draining = Draining(queue, fleet, outbox)
        self._disks = Disks(inventory, outbox)
        self._replication = Replication(queue, fleet, choosers, inventory, models, outbox, self._disks)
        self._prefetch = Prefetch(queue, fleet, choosers, models, self._replication, self._disks)
        self._forecast = Forecast(queue, models, prices)
        self._ladder = Ladder(queue, fleet, models, choosers, self._replication, self._forecast)
        self.refusals = Refusals(queue, fleet.suspects, self._ladder, self._forecast, outbox)
        self._queue = queue
        self._fleet = fleet
        self._admission = admission
        self._models = models
        self._policy = fleet.policy
        self._out = outbox
        self._epoch = 0
        self._touched: set[str] = set()
        self._freed: list[Replica] = []
        self._newcomer: Waiting | None = None
        self._decisions = 0  # since the last event

    def look_again(self) -> None:
        """Something has changed that every choice depends on."""
        self._epoch += 1

    def arrived(self, waiting: Waiting) -> None:
        """A request is new in the queue. For those before it in its line nothing has changed."""
        if self._queue.head(waiting.model) is waiting:
            self._touched.add(waiting.model)
        self._newcomer = waiting

    def look_at(self, model: str) -> None:
        """Something has changed for the requests of one model."""
        self._touched.add(model)

    def serve(self, now: float) -> None:
        """Serve whoever waits. Free slots are given away before anybody is evicted, so that a model which is asked for
        is not idle; then places are found for the others, the longest wait first."""
        self._decisions = 0
        settled = self._fleet.is_settled
        if settled and not self._queue and not self._draining:
            self._touched.clear()
            self._freed.clear()
            return
        if self._draining:
            self._reopened(self._draining.reopen_unwanted())
        if not settled:
            self._fleet.stop_retired()
        for name in self._to_serve(now):
            while (head := self._queue.head(name)) and (ready := self._free_replica(head)):
                if not self._serve_from(head, ready, now):
                    break
        if self._freed:
            if any(replica.idle for replica in self._freed):  # its own requests did not take it: it may make room
                self.look_again()
            self._freed.clear()
        if not self._fleet.is_settled:
            self._fleet.start_pending(self._queue.length, now)
        if self._queue:
            for name in self._to_serve(now):
                self._serve_model(name, now)
        self._touched.clear()
        if self._newcomer is not None:
            if self._newcomer is not self._queue.head(self._newcomer.model):  # or it has just been looked at
                self.refusals.refuse_if_late(self._newcomer, now)
            self._newcomer = None

    def _to_serve(self, now: float) -> list[str]:
        """Models that somebody waits for, but for those about which nothing has changed since they were looked at."""
        touched, epoch = self._touched, self._epoch
        return [
            head.model
            for head in self._queue.heads()
            if head.model in touched or head.looked_at_epoch != epoch or now >= head.look_again_at
        ]

    def time_passes(self, now: float) -> None:
        """Whatever is due although nothing has happened."""
        for lease in list(self._draining.preempted(now)):
            self.reclaim(lease, now)
        self._reopened(self._draining.drain_who_is_due(now))
        self.refusals.refuse_late(now)
        for model, fingerprint in self._fleet.suspects.age(now):
            self.refusals.refuse_condemned(model, fingerprint, now)
            self.look_again()
        self._replication.keep_minimum(now)
        self._prefetch.fetch(now)

    def _reopened(self, replicas: Iterable[Replica]) -> None:
        self._touched.update(replica.model for replica in replicas)

    # ------------------------------------------------------------------ what is asked without a request

    def plan(self, model: Model, waiting: Waiting, now: float) -> Preview:
        """What would be done for the request if it came now, without doing it.

        Raises the error that it would be refused with, but for a lack of room: that is a choice too.
        """
        self._admission.check(model, waiting)
        self._queue.displaced_by(waiting)
        waiting.rank = self._queue.rank(waiting)
        before = self._queue.before(waiting)
        if before:
            self._forecast.check(waiting, self._ladder.coming(waiting), now)
            reason = f"{before} earlier requests for this model come first"
            coming = self._ladder.coming(waiting)
            if coming:
                return Preview(coming[0], None, reason=reason)
            return Preview(None, Choice("wait", None, frozenset()), reason=reason)
        decision = self._ladder.decide(waiting, now, explain=True)
        match decision:
            case Serve(replica):
                return Preview(replica, None)
            case Move(_, choice):
                return Preview(None, choice, (choice.offer,) if choice.offer else ())
            case Place(choice, chooser) | NoRoom(_, choice, chooser):
                return Preview(None, choice, tuple(chooser.options()))
            case Wait(yet=True):
                raise Unavailable(f"{model.name}: {decision.reason}", retry_after_s=1.0)
            case Wait():
                return self._waiting_plan(model, waiting, decision, now)
            case Refuse(error):
                raise error

    def _waiting_plan(self, model: Model, waiting: Waiting, decision: Wait, now: float) -> Preview:
        if decision.coming:
            beside = self._replication.beside(model, waiting, now)
            return Preview(decision.coming[0], None, beside, decision.reason)
        choice = decision.choice or Choice("wait", None, decision.in_the_way)
        options = tuple(decision.chooser.options()) if decision.chooser else ()
        return Preview(None, choice, options, decision.reason)

    def busy(self, waiting: Waiting) -> Replica | None:
        """A ready replica that will serve the request, when none of them has a free slot."""
        if self._free_replica(waiting) is not None:
            return None
        coming = self._ladder.coming(waiting)
        return next((replica for replica in coming if replica.state is ReplicaState.READY), None)

    # ------------------------------------------------------------------ carrying decisions out

    def _free_replica(self, waiting: Waiting) -> Replica | None:
        return self._ladder.free_among(self._ladder.coming(waiting), waiting)

    def _serve_model(self, name: str, now: float) -> None:
        """Grant or refuse a model's requests in turn, until the first has to wait."""
        while head := self._queue.head(name):
            ready = self._free_replica(head)
            if ready is not None:
                if not self._serve_from(head, ready, now):
                    return
            elif now < head.look_again_at and self._decisions >= MOST_DECISIONS or not self._see_to(head, now):
                return

    def _serve_from(self, head: Waiting, ready: Replica, now: float) -> bool:
        """Give the request a slot of a replica that has one free; False when it is loaded anew elsewhere instead."""
        decision = self._ladder.serve(head, ready, now)
        if self._replication.compares(ready, now):
            ready.compared_at = now
        better = decision.choice if isinstance(decision, Move) else decision.better
        if better is not None:
            self._replication.move(ready, better, now)
            self._fleet.start_pending(self._queue.length, now)
        if isinstance(decision, Move):
            self._waits(head, "its model moves to a faster place", now)
            return False
        self._grant(head, ready, now)
        return True

    def _see_to(self, head: Waiting, now: float) -> bool:
        """Decide for a request that no replica has a slot for. Whether it is gone, and the next one is first."""
        head.in_the_way = frozenset()
        decision = self._ladder.without_a_slot(head, now)
        if not isinstance(decision, Wait) or decision.chooser is not None:  # a place was sought, which takes its time
            self._decisions += 1
        refused = self._carry_out(head, decision, now)
        if isinstance(refused, ArrieroError):
            if isinstance(refused, DeadlineExceeded):  # its own, not that of those behind it
                self.refusals.refuse_as_late(head, refused)
            else:
                self.refusals.refuse_alike(head, refused)
            return True
        self._waits(head, refused, now)
        return False

    def _waits(self, head: Waiting, reason: str, now: float) -> None:
        head.reason, head.looked_at_epoch = reason, self._epoch
        # the longer somebody has waited, the less another moment changes
        head.look_again_at = now + max(LOOK_AGAIN_S, LOOK_AGAIN_SHARE * (now - head.arrived_at))

    def _carry_out(self, head: Waiting, decision: WithoutSlot, now: float) -> str | ArrieroError:
        """What the request waits for then, or the error that it is to be refused with."""
        match decision:
            case Wait():
                if decision.coming:
                    self._lean_on(head, decision.coming, now)
                self._make_room(head, decision.in_the_way, now)
                return decision.reason
            case Place(choice):
                replica = self._replication.place(self._models.by_name[head.model], choice, now)
                self._make_room(head, frozenset(), now)
                self._fleet.start_pending(self._queue.length, now)
                return explain_coming(replica)
            case NoRoom(kind, _, chooser, pauses):
                model = self._models.by_name[head.model]
                if pauses:
                    model.history.pause(self._policy, now)
                    self._fleet.charges.remember_extra(model)
                return self.refusals.of_no_room(kind, model, chooser)
            case Refuse(error):
                return error

    def _lean_on(self, head: Waiting, coming: Sequence[Replica], now: float) -> None:
        """The request waits for these. Would one more be sooner?"""
        for replica in coming:
            replica.preloaded = False  # now somebody has asked for it
        if self._decisions < MOST_DECISIONS and self._replication.spread(head, coming, now):
            self._decisions += 1
            self._fleet.start_pending(self._queue.length, now)

    def _make_room(self, head: Waiting, in_the_way: Victims, now: float) -> None:
        """Have the replicas make room once they have ended, and take nothing new before long."""
        head.in_the_way = in_the_way
        due = in_the_way if now - head.arrived_at >= self._policy.drain_after_s else frozenset()
        self._reopened(self._draining.drain(head, due, now))

    def _grant(self, waiting: Waiting, replica: Replica, now: float) -> None:
        self._queue.served(waiting, now)
        if waiting.model in self._models.by_name:
            self._models.by_name[waiting.model].popularity.asked(now)
            self._models.by_name[waiting.model].dismissed = False
        if waiting.prefix:
            replica.saw(waiting.prefix)
        replica.preloaded = False
        self._fleet.replicas.used(replica)
        self._fleet.suspects.granted(replica.replica_id, waiting.model, waiting.fingerprint, now)
        lease = self._fleet.leases.grant(
            waiting.request_id,
            replica,
            now,
            waiting.priority,
            answers=waiting.kind != "load",
            fingerprint=waiting.fingerprint,
        )
        ttl_s = self._fleet.leases.ttl_s
        self._out.post(
            cmd.GrantLease(waiting.request_id, lease.lease_id, replica.replica_id, replica.model, replica.n_ctx, ttl_s)
        )

    # ------------------------------------------------------------------ slots that come back

    def reclaim(self, lease: Lease, now: float) -> None:
        """Take a slot back, and end what is computed there."""
        self._out.post(cmd.CancelAnswer(lease.replica_id, lease.lease_id))
        self.release(lease.lease_id, "left", now)

    def release(self, lease_id: LeaseId, ending: Ending, now: float) -> tuple[Replica, Lease] | None:
        """A slot is free again; None when the lease is not known, or was dropped before."""
        lease = self._fleet.leases.take_back(lease_id)
        if lease is None:
            return None
        replica = self._fleet.replicas[lease.replica_id]
        replica.leases.discard(lease_id)
        replica.last_used_at = now
        self._fleet.suspects.released(replica.replica_id, replica.model, lease.fingerprint, ending, now)
        self._fleet.replicas.used(replica)
        self._touched.add(replica.model)
        self._freed.append(replica)
        return replica, lease

    def is_protected(self, replica: Replica) -> bool:
        return bool(self._choosers.protection(replica))

    def read_ahead_ended(self, node_id: NodeId) -> None:
        self._disks.ended(node_id)
