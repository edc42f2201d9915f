"""Serving whoever waits: free slots first, then places for the models that have none, the longest wait first.

A decision costs some milliseconds. It is made anew when facts have changed (`look_again`), and once a second while
somebody waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scheduler import commands as cmd
from scheduler.choice.admission import Admission
from scheduler.choice.candidates import ON_GPU
from scheduler.choice.eviction import Victims
from scheduler.choice.explain import explain_coming, explain_refusal, explain_waiting
from scheduler.choice.placement import Choice, Chooser
from scheduler.choice.price import Prices
from scheduler.choice.queue import RequestQueue, Waiting
from scheduler.choice.search import Found
from scheduler.choosers import Choosers
from scheduler.cluster.inventory import Inventory
from scheduler.cluster.leases import Lease
from scheduler.cluster.models import Model, Models
from scheduler.cluster.replica import Replica, ReplicaState
from scheduler.errors import ArrieroError, DeadlineExceeded, Impossible, Rejected, Unavailable, UnknownModel
from scheduler.fleet import Fleet
from scheduler.forecast import Forecast
from scheduler.outbox import Outbox
from scheduler.turns import Turns
from scheduler.units import LeaseId, NodeId
from scheduler.upkeep import Upkeep

MOST_DECISIONS = 8  # per event, the longest waits first: with dozens of models waiting, the others' turn comes later
LOOK_AGAIN_S = 1.0  # a request for which no place was found is looked at again after so long, facts changed or not,
LOOK_AGAIN_SHARE = 0.1  # or after so much of the time that it had waited


@dataclass(frozen=True, slots=True)
class Plan:
    """Either the replica that serves (or will serve) the request, or the choice that would be made.

    `options` are what could be had now, best first: (placement, victims) of each kind, the chosen one included; with a
    busy replica, where another one could be.
    """

    serving: Replica | None
    choice: Choice | None
    options: tuple[Found, ...] = ()


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
        self._choosers = Choosers(fleet, admission, inventory, models, prices)
        self._turns = Turns(queue, fleet, outbox)
        self._upkeep = Upkeep(queue, fleet, self._choosers, inventory, models, outbox)
        self._forecast = Forecast(queue, models, prices)
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
        self._now = 0.0

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
        self._now, self._decisions = now, 0
        settled = self._fleet.is_settled
        if settled and not self._queue and not self._turns:
            self._touched.clear()
            self._freed.clear()
            return
        if self._turns:
            self._reopened(self._turns.reopen_unwanted())
        if not settled:
            self._fleet.stop_retired()
        for name in self._to_serve():
            while (head := self._queue.head(name)) and (ready := self._free_replica(head)):
                if self._moves(head, ready):
                    break
                self._grant(head, ready)
        if self._freed:
            if any(replica.idle for replica in self._freed):  # its own requests did not take it: it may make room
                self.look_again()
            self._freed.clear()
        if not self._fleet.is_settled:
            self._fleet.start_pending(self._queue.length, now)
        if self._queue:
            for name in self._to_serve():
                self._serve_model(name)
        self._touched.clear()
        if self._newcomer is not None:
            if self._newcomer is not self._queue.head(self._newcomer.model):  # or it has just been looked at
                self._refuse_if_late(self._newcomer)
            self._newcomer = None

    def _to_serve(self) -> list[str]:
        """Models that somebody waits for, but for those about which nothing has changed since they were looked at."""
        touched, epoch, now = self._touched, self._epoch, self._now
        return [
            head.model
            for head in self._queue.heads()
            if head.model in touched or head.looked_at_epoch != epoch or now >= head.look_again_at
        ]

    def time_passes(self, now: float) -> None:
        """Whatever is due although nothing has happened."""
        self._now = now
        for lease in list(self._turns.preempted(now)):
            self.reclaim(lease)
        self._reopened(self._turns.drain_who_is_due(now))
        self._refuse_late()
        self._upkeep.keep_minimum(now)
        self._upkeep.prefetch(now)

    def _reopened(self, replicas: Iterable[Replica]) -> None:
        self._touched.update(replica.model for replica in replicas)

    def _refuse_late(self) -> None:
        """Requests whose deadline has passed, or cannot be met any more."""
        for waiting in self._queue.expired(self._now):
            waited = (
                f"{waiting.model}: waited {self._now - waiting.arrived_at:.0f} s; {waiting.reason or 'no free slot'}"
            )
            self._refuse_as_late(waiting, DeadlineExceeded(waited, retry_after_s=10.0, model=waiting.model))
        for head in tuple(self._queue.heads()):
            self._refuse_if_late(head)

    def _refuse_if_late(self, waiting: Waiting, coming: Sequence[Replica] | None = None) -> bool:
        """Refuse a request that waits if it cannot be served in time, in its place in the queue."""
        if waiting.request_id in self._queue:
            try:
                self._forecast.check(waiting, self._coming(waiting) if coming is None else coming, self._now)
            except DeadlineExceeded as error:
                self._refuse_as_late(waiting, error)
                return True
        return False

    def _refuse_as_late(self, waiting: Waiting, error: DeadlineExceeded) -> None:
        self._out.announce("request_expired", f"a request's deadline cannot be met: {error.message}", waiting.model)
        self.refuse(waiting, error)

    def plan(self, model: Model, waiting: Waiting, now: float) -> Plan:
        """What would be done for the request now, without doing it.

        Raises the error that it would be refused with, but for a lack of room: that is a choice too.
        """
        self._admission.check(model, waiting)
        coming = self._coming(waiting)
        serving = self._free_among(coming, waiting) or next(iter(coming), None)
        moved = self._upkeep.moved(model, waiting, serving, now) if serving is not None else None
        if moved is not None and moved.placement is not None:
            return Plan(None, moved, ((moved.placement, moved.victims),))
        if serving is not None:
            beside = () if serving.free_slots else self._upkeep.beside(model, waiting, now)
            return Plan(serving, None, beside)
        need = self._admission.need(model, waiting, now)
        if need is None:
            raise Unavailable(f"{model.name}: {self._admission.why_not_yet(model)}", retry_after_s=1.0)
        chooser = self._choosers.of(model, waiting, need, now)
        choice = chooser.with_alternatives(explain=True)
        if choice.verdict == "impossible" and not self._admission.final(model):
            raise Unavailable(f"{model.name}: {self._admission.why_not_yet(model)}", retry_after_s=1.0)
        return Plan(None, choice, tuple(chooser.options()))

    def busy(self, waiting: Waiting) -> Replica | None:
        """A ready replica that will serve the request, when none of them has a free slot."""
        if self._free_replica(waiting) is not None:
            return None
        return next((replica for replica in self._coming(waiting) if replica.state is ReplicaState.READY), None)

    def _grant(self, waiting: Waiting, replica: Replica) -> None:
        self._queue.served(waiting, self._now)
        if waiting.model in self._models.by_name:
            self._models.by_name[waiting.model].popularity.asked(self._now)
            self._models.by_name[waiting.model].dismissed = False
        if waiting.prefix:
            replica.saw(waiting.prefix)
        replica.preloaded = False
        self._fleet.replicas.used(replica)
        lease = self._fleet.leases.grant(
            waiting.request_id, replica, self._now, waiting.priority, answers=waiting.kind != "load"
        )
        ttl_s = self._fleet.leases.ttl_s
        self._out.post(
            cmd.GrantLease(waiting.request_id, lease.lease_id, replica.replica_id, replica.model, replica.n_ctx, ttl_s)
        )

    def _moves(self, head: Waiting, replica: Replica) -> bool:
        """Whether the replica is loaded anew in a better place instead of serving the request where it is; a busy one
        serves on until the other is ready."""
        if replica.placement.tier in ON_GPU:
            return False
        busy, choice = replica.busy, self._upkeep.better_place(head, replica, self._now)
        if choice is not None:
            self._upkeep.move(replica, choice, self._now)
            self._fleet.start_pending(self._queue.length, self._now)
        return choice is not None and not busy

    def refuse(self, waiting: Waiting, error: ArrieroError) -> None:
        self._queue.remove(waiting.request_id)
        self._out.post(cmd.RefuseRequest(waiting.request_id, error))

    def _refuse_alike(self, head: Waiting, error: ArrieroError) -> None:
        """Refuse the request and those behind it that want the same."""
        for waiting in self._queue.of_model(head.model):
            if (waiting.kind, waiting.n_ctx) == (head.kind, head.n_ctx):
                self.refuse(waiting, error)
        told = {key: error.details[key] for key in ("reasons", "would_fit_if") if key in error.details}
        self._out.announce("request_refused", error.message, head.model, **told)

    def _serve_model(self, name: str) -> None:
        """Grant or refuse a model's requests in turn, until the first has to wait."""
        while head := self._queue.head(name):
            coming = self._coming(head)
            ready = self._free_among(coming, head)
            if ready is not None and not self._moves(head, ready):
                self._grant(head, ready)
                continue
            served = any(replica.state is ReplicaState.READY for replica in coming)  # then the first in line is next
            if not served and self._refuse_if_late(head, coming):
                continue
            try:
                if self._now >= head.look_again_at or self._decisions < MOST_DECISIONS:
                    head.in_the_way = frozenset()
                    head.reason = self._see_to(head, coming if ready is None else self._coming(head))
                    head.looked_at_epoch = self._epoch
                    # the longer somebody has waited, the less another moment changes
                    waited_s = self._now - head.arrived_at
                    head.look_again_at = self._now + max(LOOK_AGAIN_S, LOOK_AGAIN_SHARE * waited_s)
                return
            except (Rejected, Unavailable) as error:
                self._refuse_alike(head, error)

    def _see_to(self, head: Waiting, coming: Sequence[Replica]) -> str:
        """See to it that a place comes for the request; what it waits for. Raises the error to refuse it with."""
        if coming:
            for replica in coming:
                replica.preloaded = False  # now somebody has asked for it
            if self._decisions < MOST_DECISIONS and self._upkeep.spread(head, coming, self._now):
                self._decisions += 1
                self._fleet.start_pending(self._queue.length, self._now)
            self._reopened(self._turns.drain(head, frozenset(), self._now))
            return explain_coming(coming[0])
        ours = self._fleet.replicas.of_model(head.model)
        draining = next((r for r in ours if r.drain_for not in ("", head.model)), None)
        if draining is not None:  # a second replica beside it would stay where there happens to be room now
            self._reopened(self._turns.drain(head, frozenset(), self._now))
            return f"{head.model} finishes to make room for {draining.drain_for}, and comes back after it"
        too_many = self._upkeep.more_than_allowed(head)
        if too_many:  # they do not hold what is asked for, and one of them has to go first
            return self._wait_for(head, too_many)
        self._decisions += 1
        model = self._models.by_name.get(head.model)
        if model is None:
            raise UnknownModel(f"no machine has a file of {head.model} any more", model=head.model)
        need = self._admission.need(model, head, self._now)
        if need is None:
            return self._admission.why_not_yet(model)
        chooser = self._choosers.of(model, head, need, self._now)
        choice = chooser.with_alternatives()
        match choice.verdict:
            case "free" | "evict":
                replica = self._fleet.place(model, choice, self._now)
                self._reopened(self._turns.drain(head, frozenset(), self._now))
                self._upkeep.stop_reading_ahead(replica.placement.node_id)
                self._fleet.start_pending(self._queue.length, self._now)
                return explain_coming(replica)
            case "wait":
                waited_s = self._now - head.arrived_at
                if choice.placement is None and waited_s >= self._policy.release_timeout_s:
                    raise self._refusal(Unavailable, model, chooser)
                return self._wait_for(head, choice.victims)
            case "blocked":
                raise self._refusal(Unavailable, model, chooser)
            case "impossible":
                if not self._admission.final(model):
                    return self._admission.why_not_yet(model)
                if need.extra_bytes:  # it is only so large because it ran out of memory before
                    model.history.pause(self._policy, self._now)
                    self._fleet.remember_extra(model)
                    raise self._refusal(Unavailable, model, chooser)
                raise self._refusal(Impossible, model, chooser)

    def _wait_for(self, head: Waiting, in_the_way: Victims) -> str:
        """Have the replicas make room once they have ended, and take nothing new before long. What it waits for."""
        head.in_the_way = in_the_way
        due = in_the_way if self._now - head.arrived_at >= self._policy.drain_after_s else frozenset()
        self._reopened(self._turns.drain(head, due, self._now))
        return explain_waiting(self._fleet.replicas[replica_id] for replica_id in sorted(in_the_way))

    def _free_replica(self, waiting: Waiting) -> Replica | None:
        return self._free_among(self._coming(waiting), waiting)

    def _free_among(self, coming: Sequence[Replica], waiting: Waiting) -> Replica | None:
        """Of the replicas that will serve the request, a ready one with a free slot: one on GPUs, unless requests for
        other models wait, which may need these; one that knows how the prompt begins; else the one with the fewest
        requests, of such the most recently used."""
        able = [replica for replica in coming if replica.free_slots > 0]
        if len(able) < 2:
            return able[0] if able else None
        contended = any(head.model != waiting.model for head in self._queue.heads())

        def fitness(replica: Replica) -> tuple[bool, bool, int, float]:
            knows_prompt = bool(waiting.prefix) and waiting.prefix in replica.prefixes
            on_gpus = contended or replica.placement.tier in ON_GPU
            return on_gpus, knows_prompt, -len(replica.leases), replica.last_used_at

        return max(able, key=fitness)

    def _coming(self, waiting: Waiting) -> list[Replica]:
        """Replicas that will serve the request: ready ones, busy or not, and those that are being loaded."""
        ours = self._fleet.replicas.of_model(waiting.model)
        if not ours:
            return []
        n_ctx = self._admission.least_n_ctx(waiting)
        return [
            replica
            for replica in ours
            if replica.open
            and replica.n_ctx >= n_ctx
            and (waiting.kind != "embed" or replica.placement.context.embeddings)
        ]

    def _refusal(self, kind: type[ArrieroError], model: Model, chooser: Chooser) -> ArrieroError:
        choice = chooser.choose(explain=True)
        history = model.history
        because = ""
        if history.pauses:
            because = f"and nobody is evicted for it after repeated failures (last: {history.last_failure})"
        because = ", ".join(filter(None, (str(chooser.need.wishes), because)))
        return explain_refusal(kind, model.name, choice.rejections, choice.would_fit_if, because)

    def reclaim(self, lease: Lease) -> None:
        """Take a slot back, and end what is computed there."""
        self._out.post(cmd.CancelAnswer(lease.replica_id, lease.lease_id))
        self.release(lease.lease_id, self._now)

    def release(self, lease_id: LeaseId, now: float) -> tuple[Replica, Lease] | None:
        """A slot is free again; None when the lease is not known, or was dropped before."""
        lease = self._fleet.leases.take_back(lease_id)
        if lease is None:
            return None
        replica = self._fleet.replicas[lease.replica_id]
        replica.leases.discard(lease_id)
        replica.last_used_at = now
        self._fleet.replicas.used(replica)
        self._touched.add(replica.model)
        self._freed.append(replica)
        return replica, lease

    def is_protected(self, replica: Replica) -> bool:
        return bool(self._choosers.protection(replica))

    def read_ahead_ended(self, node_id: NodeId) -> None:
        self._upkeep.read_ahead_ended(node_id)
