"""Serving whoever waits: free slots first, then places for the models that have none, the longest wait first.

A decision costs some milliseconds. It is made anew when facts have changed (`look_again`), and once a second while
somebody waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from scheduler import commands as cmd
from scheduler.choice.admission import Admission
from scheduler.choice.candidates import Need
from scheduler.choice.eviction import Victims
from scheduler.choice.explain import explain_coming, explain_refusal, explain_waiting
from scheduler.choice.placement import Choice, Chooser, Found
from scheduler.choice.price import Prices
from scheduler.choice.queue import RequestQueue, Waiting
from scheduler.cluster.inventory import Inventory
from scheduler.cluster.models import Model, Models
from scheduler.cluster.replica import Placement, Replica, ReplicaState
from scheduler.errors import ArrieroError, Impossible, Rejected, Unavailable, UnknownModel
from scheduler.fleet import Fleet
from scheduler.outbox import Outbox
from scheduler.units import ReplicaId

MOST_DECISIONS = 8  # per event, the longest waits first: with dozens of models waiting, the others' turn comes later
LOOK_AGAIN_S = 1.0  # a request for which no place was found is looked at again after so long, facts changed or not,
LOOK_AGAIN_SHARE = 0.1  # or after so much of the time that it had waited
LOAD_TIMES_BEFORE_DRAIN = 3.0  # a replica serves for so many times its load time before others may drain it,
LOAD_TIMES_BEFORE_SPREADING = 2.0  # a wait so many times as long as a load is worth another replica
LONGEST_REST_S = 60.0  # but not longer than this (or the minimum residency): two busy models take turns


@dataclass(frozen=True, slots=True)
class Plan:
    """Either the replica that serves (or will serve) the request, or the choice that would be made.

    `options` are what could be had now, best first: (placement, victims) of each kind, the chosen one included.
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
        self._prices = prices
        self._queue = queue
        self._fleet = fleet
        self._admission = admission
        self._inventory = inventory
        self._models = models
        self._policy = fleet.policy
        self._out = outbox
        self._epoch = 0
        self._touched: set[str] = set()
        self._freed: list[Replica] = []
        self._draining: dict[ReplicaId, Replica] = {}
        self._decisions = 0  # since the last event
        self._now = 0.0

    def look_again(self) -> None:
        """Something has changed that every choice depends on."""
        self._epoch += 1

    def look_at(self, model: str) -> None:
        """Something has changed for the requests of one model."""
        self._touched.add(model)

    def freed(self, replica: Replica) -> None:
        """A slot of the replica has come free."""
        self._touched.add(replica.model)
        self._freed.append(replica)

    def serve(self, now: float) -> None:
        """Serve whoever waits. Free slots are given away before anybody is evicted, so that a model which is asked for
        is not idle; then places are found for the others, the longest wait first."""
        self._now, self._decisions = now, 0
        if not len(self._queue) and not self._draining and self._fleet.is_settled:
            self._touched.clear()
            self._freed.clear()
            return
        for replica in list(self._draining.values()):
            if replica.replica_id not in self._fleet.replicas or not self._queue.length(replica.drain_for):
                self._reopen(replica)
        self._fleet.stop_retired()
        for name in self._to_serve():
            while (head := self._queue.head(name)) and (ready := self._free_replica(head)):
                self._grant(head, ready)
        if any(replica.idle for replica in self._freed):  # its own requests did not take it: it may make room
            self.look_again()
        self._freed.clear()
        self._fleet.start_pending(self._queue.length, now)
        for name in self._to_serve():
            self._serve_model(name)
        self._touched.clear()

    def _to_serve(self) -> list[str]:
        """Models that somebody waits for, but for those about which nothing has changed since they were looked at."""
        return [name for name in self._queue.models() if name in self._touched or self._may_have_changed(name)]

    def _may_have_changed(self, name: str) -> bool:
        head = self._queue.head(name)
        return head is not None and (head.looked_at_epoch != self._epoch or self._is_due(head))

    def _is_due(self, head: Waiting) -> bool:
        """The longer somebody has waited, the less another moment changes."""
        so_far_s = head.looked_at - head.arrived_at
        return self._now - head.looked_at >= max(LOOK_AGAIN_S, LOOK_AGAIN_SHARE * so_far_s)

    def time_passes(self, now: float) -> None:
        """Busy replicas in somebody's way take nothing new, once they have served long enough."""
        self._now = now
        for name in self._queue.models():
            head = self._queue.head(name)
            if head is not None and head.in_the_way and now - head.arrived_at >= self._policy.drain_after_s:
                self._drain(head, frozenset(r for r in head.in_the_way if r in self._fleet.replicas))

    def plan(self, model: Model, waiting: Waiting, now: float) -> Plan:
        """What would be done for the request now, without doing it.

        Raises the error that it would be refused with, but for a lack of room: that is a choice too.
        """
        self._admission.check(model, waiting)
        serving = self._free_replica(waiting) or next(iter(self._coming(waiting)), None)
        if serving is not None:
            return Plan(serving, None)
        need = self._admission.need(model, waiting, now)
        if need is None:
            raise Unavailable(f"{model.name}: {self._admission.why_not_yet(model)}", retry_after_s=1.0)
        chooser = self._chooser(model, waiting, need, now)
        choice = chooser.choose(explain=True)
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
        if waiting.prefix:
            replica.prefixes.append(waiting.prefix)
        replica.preloaded = False
        lease = self._fleet.leases.grant(waiting.request_id, replica, self._now)
        ttl_s = self._fleet.leases.ttl_s
        self._out.post(
            cmd.GrantLease(waiting.request_id, lease.lease_id, replica.replica_id, replica.model, replica.n_ctx, ttl_s)
        )

    def refuse(self, waiting: Waiting, error: ArrieroError) -> None:
        self._queue.remove(waiting.request_id)
        self._out.post(cmd.RefuseRequest(waiting.request_id, error))

    def _refuse_alike(self, head: Waiting, error: ArrieroError) -> None:
        """Refuse the request and those behind it that want the same."""
        for waiting in self._queue.of_model(head.model):
            if (waiting.kind, waiting.n_ctx) == (head.kind, head.n_ctx):
                self.refuse(waiting, error)
        self._out.announce("request_refused", error.message, head.model)

    def _serve_model(self, name: str) -> None:
        """Grant or refuse a model's requests in turn, until the first has to wait."""
        while head := self._queue.head(name):
            ready = self._free_replica(head)
            if ready is not None:
                self._grant(head, ready)
                continue
            try:
                if self._is_due(head) or self._decisions < MOST_DECISIONS:
                    head.in_the_way = frozenset()
                    head.reason = self._see_to(head)
                    head.looked_at_epoch, head.looked_at = self._epoch, self._now
                return
            except (Rejected, Unavailable) as error:
                self._refuse_alike(head, error)

    def _see_to(self, head: Waiting) -> str:
        """See to it that a place comes for the request; what it waits for. Raises the error to refuse it with."""
        coming = self._coming(head)
        if coming:
            self._spread(head, coming)
            return explain_coming(coming[0])
        ours = self._fleet.replicas.of_model(head.model)
        draining = next((r for r in ours if r.drain_for not in ("", head.model)), None)
        if draining is not None:  # a second replica beside it would stay where there happens to be room now
            return f"{head.model} finishes to make room for {draining.drain_for}, and comes back after it"
        self._decisions += 1
        model = self._models.by_name.get(head.model)
        if model is None:
            raise UnknownModel(f"no machine has a file of {head.model} any more", model=head.model)
        need = self._admission.need(model, head, self._now)
        if need is None:
            return self._admission.why_not_yet(model)
        chooser = self._chooser(model, head, need, self._now)
        choice = chooser.choose()
        match choice.verdict:
            case "free" | "evict":
                replica = self._fleet.place(model, choice, self._now)
                self._drain(head, frozenset())
                self._fleet.start_pending(self._queue.length, self._now)
                return explain_coming(replica)
            case "wait":
                waited_s = self._now - head.arrived_at
                if choice.placement is None and waited_s >= self._policy.release_timeout_s:
                    raise self._refusal(Unavailable, model, chooser)
                head.in_the_way = choice.victims
                self._drain(head, choice.victims if waited_s >= self._policy.drain_after_s else frozenset())
                return explain_waiting(self._fleet.replicas[replica_id] for replica_id in sorted(choice.victims))
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

    def _free_replica(self, waiting: Waiting) -> Replica | None:
        """A ready replica with a free slot that is long enough: one that knows how the prompt begins, else the one with
        the fewest requests, of such the most recently used."""
        able = [replica for replica in self._coming(waiting) if replica.free_slots > 0]
        if len(able) < 2:
            return able[0] if able else None
        prefix = waiting.prefix
        return max(
            able, key=lambda each: (bool(prefix) and prefix in each.prefixes, -len(each.leases), each.last_used_at)
        )

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

    def _spread(self, head: Waiting, coming: Sequence[Replica]) -> None:
        """Load the model once more, on free GPUs of its own, when that is sooner than the last of its requests would
        have a slot. Only where speeds are known: on devices that share a CPU it would gain nothing."""
        model = self._models.by_name.get(head.model)
        ours = self._fleet.replicas.of_model(head.model)
        most = self._models.params(model).max_replicas if model else 1
        if model is None or len(ours) >= (most or len(ours) + 1) or not model.history.may_evict:
            return
        shape = model.shape
        if shape is None or not all(replica.state is ReplicaState.READY for replica in ours):
            return
        beside = coming[0].placement
        wait_s = self._prices.request_s(shape, model.name, beside)
        wait_s *= self._queue.length(model.name) / sum(replica.slots for replica in coming)
        if wait_s < LOAD_TIMES_BEFORE_SPREADING * self._prices.load_s(shape, model.name, beside):
            return
        need = self._admission.need(model, head, self._now)
        if need is None or self._price_s(need, beside, frozenset(), self._now) is None:
            return
        taken = frozenset(device_id for replica in ours for device_id in replica.placement.device_ids)
        chooser = self._chooser(model, head, need.elsewhere(taken), self._now)
        self._decisions += 1
        choice = replace(chooser, may_evict=False, outgrown=frozenset()).choose()
        if choice.verdict == "free":
            self._fleet.place(model, choice, self._now)
            self._fleet.start_pending(self._queue.length, self._now)

    def _chooser(self, model: Model, waiting: Waiting, need: Need, now: float) -> Chooser:
        n_ctx = self._admission.least_n_ctx(waiting)
        return Chooser(
            need=need,
            nodes=self._admission.nodes(model),
            inventory=self._inventory,
            rooms=self._fleet.rooms,
            replicas=self._fleet.replicas,
            pinned=lambda name: name in self._models.by_name and self._models.by_name[name].pinned,
            policy=self._policy,
            now=now,
            waited_s=now - waiting.arrived_at,
            outgrown=frozenset(
                r.replica_id
                for r in self._fleet.replicas.of_model(model.name)
                if r.idle and not r.retiring and r.drain_for in ("", model.name) and r.n_ctx < n_ctx
            ),
            may_evict=model.history.may_evict,
            price=lambda placement, victims: self._price_s(need, placement, victims, now),
            regret=_remembering(lambda replica: self._prices.regret_s(replica, now)),
        )

    def _price_s(self, need: Need, placement: Placement, victims: Victims, now: float) -> float | None:
        """None where speeds are not known, and for virtual GPUs: they are no faster than the CPU that they run on."""
        if any(device.facts.kind == "rpc" for device in self._inventory.nodes[placement.node_id].devices.values()):
            return None
        price = self._prices.of(need.shape, need.model, placement, victims, now)
        return price.total_s if price.service_s is not None else None

    def _refusal(self, kind: type[ArrieroError], model: Model, chooser: Chooser) -> ArrieroError:
        choice = chooser.choose(explain=True)
        history = model.history
        because = ""
        if history.pauses:
            because = f"and nobody is evicted for it after repeated failures (last: {history.last_failure})"
        because = ", ".join(filter(None, (str(chooser.need.wishes), because)))
        return explain_refusal(kind, model.name, choice.rejections, choice.n_ctx_that_fits, because)

    def _drain(self, head: Waiting, victims: frozenset[ReplicaId]) -> None:
        """Let those `victims` that have served long enough take nothing new until they have made room; others that
        were to make room for this request are open again."""
        for replica in list(self._draining.values()):
            if replica.drain_for == head.model and replica.replica_id not in victims:
                self._reopen(replica)
        for replica_id in sorted(victims):
            replica = self._fleet.replicas[replica_id]
            if replica.busy and not replica.drain_for and self._now - replica.ready_at >= self._turn_s(replica):
                replica.drain_for = head.model
                self._draining[replica_id] = replica
                message = f"{replica.model} finishes to make room for {head.model}"
                self._out.announce("replica_draining", message, replica=replica)

    def _turn_s(self, replica: Replica) -> float:
        """How long a replica serves before others may drain it."""
        return max(self._policy.min_residency_s, min(LOAD_TIMES_BEFORE_DRAIN * replica.load_s, LONGEST_REST_S))

    def _reopen(self, replica: Replica) -> None:
        replica.drain_for = ""
        del self._draining[replica.replica_id]
        self._touched.add(replica.model)


def _remembering(regret: Callable[[Replica], float]) -> Callable[[Replica], float]:
    """The same, asked once for each replica: one decision asks many times."""
    known: dict[ReplicaId, float] = {}

    def remembered(replica: Replica) -> float:
        if replica.replica_id not in known:
            known[replica.replica_id] = regret(replica)
        return known[replica.replica_id]

    return remembered
