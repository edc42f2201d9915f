"""What is to be done for a request: serve it, load its model, let it wait, or refuse it.

The one ladder. Dispatch climbs it for whoever is first in line and carries the decision out; `arriero plan` climbs it
and shows the decision. So what a plan says is what the next request gets. It reads everything and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Union

from scheduler.choice.eviction import Victims
from scheduler.choice.explain import explain_coming, explain_waiting
from scheduler.choice.layouts import ON_GPU
from scheduler.choice.placement import Choice, Chooser
from scheduler.choosers import Choosers
from scheduler.cluster.models import Model, Models
from scheduler.cluster.queue import RequestQueue, Waiting
from scheduler.cluster.replica import Replica, ReplicaState
from scheduler.errors import ArrieroError, Impossible, Rejected, Unavailable, UnknownModel
from scheduler.fleet import Fleet
from scheduler.forecast import Forecast
from scheduler.replication import Replication


@dataclass(frozen=True, slots=True)
class Serve:
    """A slot of `replica`. `better`: a place to which the replica moves meanwhile; it serves on until then."""

    replica: Replica
    better: Choice | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """Load the model anew in a better place instead of serving the request from an idle `replica`."""

    replica: Replica
    choice: Choice


@dataclass(frozen=True, slots=True)
class Place:
    """Load the model: `choice.placement`, with `choice.victims` stopped for it."""

    choice: Choice
    chooser: Chooser


@dataclass(frozen=True, slots=True)
class Wait:
    """For one of the replicas `coming`, for busy ones `in_the_way`, or for what `reason` says.

    `choice`: what could be had once those in the way are gone. `yet`: not enough is known to decide.
    """

    reason: str
    coming: Sequence[Replica] = ()
    in_the_way: Victims = frozenset()
    choice: Choice | None = None
    chooser: Chooser | None = None
    yet: bool = False


@dataclass(frozen=True, slots=True)
class NoRoom:
    """Refuse it: `kind` is Impossible or Unavailable. `pauses`: its need has grown over what there is by failed loads,
    and the prediction gets another chance later."""

    kind: type[ArrieroError]
    choice: Choice
    chooser: Chooser
    pauses: bool = False


@dataclass(frozen=True, slots=True)
class Refuse:
    """For a reason that is not a lack of room."""

    error: ArrieroError


WithoutSlot = Union[Place, Wait, NoRoom, Refuse]  # noqa: UP007  (a runtime value on Python 3.10 too)
Decision = Union[Serve, Move, WithoutSlot]  # noqa: UP007


class Ladder:
    """Belongs to the dispatch."""

    def __init__(
        self,
        queue: RequestQueue,
        fleet: Fleet,
        models: Models,
        choosers: Choosers,
        replication: Replication,
        forecast: Forecast,
    ) -> None:
        self._queue = queue
        self._fleet = fleet
        self._admission = choosers.admission
        self._models = models
        self._choosers = choosers
        self._replication = replication
        self._forecast = forecast
        self._policy = fleet.policy

    def decide(self, head: Waiting, now: float, *, explain: bool = False) -> Decision:
        """The decision for a request that is first in its line. `explain`: choices say why places were passed over."""
        ready = self.free_among(self.coming(head), head)
        return self.without_a_slot(head, now, explain=explain) if ready is None else self.serve(head, ready, now)

    def serve(self, head: Waiting, ready: Replica, now: float) -> Serve | Move:
        """What to do when `ready` has a free slot for the request."""
        better = None
        if ready.placement.tier not in ON_GPU:
            better = self._replication.better_place(head, ready, now)
        return Serve(ready, better) if better is None or ready.busy else Move(ready, better)

    def without_a_slot(self, head: Waiting, now: float, *, explain: bool = False) -> WithoutSlot:
        """What to do when no replica has a free slot for the request. `explain` as for `decide`."""
        try:
            return self._without_a_slot(head, now, explain=explain)
        except (Rejected, Unavailable) as error:
            return Refuse(error)

    def _without_a_slot(self, head: Waiting, now: float, *, explain: bool) -> WithoutSlot:
        coming = self.coming(head)
        ready = any(replica.state is ReplicaState.READY for replica in coming)
        if not ready:  # else whoever is first in line is next
            self._forecast.check(head, coming, now)
        if self._fleet.suspects.accused(head.model, head.fingerprint):
            return Wait(f"checking a replica of {head.model}, which ended or failed on this request")
        if coming:
            return Wait(explain_coming(coming[0]), coming=coming)
        ours = self._fleet.replicas.of_model(head.model)
        draining = next((r for r in ours if r.drain_for not in ("", head.model)), None)
        if draining is not None:  # a second replica beside it would stay where there happens to be room now
            return Wait(f"{head.model} is drained to make room for {draining.drain_for}; it is loaded again after that")
        too_many = self._replication.more_than_allowed(head)
        if too_many:  # they do not hold what is asked for, and one of them has to go first
            return self._wait_for(too_many)
        model = self._models.by_name.get(head.model)
        if model is None:
            raise UnknownModel(f"the file of {head.model} is no longer on any machine", model=head.model)
        workload = self._admission.workload(model, head, now)
        if workload is None:
            return self._not_yet(model)
        chooser = self._choosers.of(model, head, workload, now)
        choice = chooser.with_alternatives(explain=explain)
        match choice.verdict:
            case "free" | "evict":
                return Place(choice, chooser)
            case "wait":
                lost = choice.placement is None and now - head.arrived_at >= self._policy.release_timeout_s
                return NoRoom(Unavailable, choice, chooser) if lost else self._wait_for(choice.victims, choice, chooser)
            case "blocked":
                return NoRoom(Unavailable, choice, chooser)
            case "impossible":
                if not self._admission.final(model):
                    return self._not_yet(model)
                grown = bool(workload.extra_bytes)  # it is only so large because it ran out of memory before
                return NoRoom(Unavailable if grown else Impossible, choice, chooser, pauses=grown)

    def _not_yet(self, model: Model) -> Wait:
        return Wait(self._admission.why_not_yet(model), yet=True)

    def _wait_for(self, victims: Victims, choice: Choice | None = None, chooser: Chooser | None = None) -> Wait:
        reason = explain_waiting(self._fleet.replicas[replica_id] for replica_id in sorted(victims))
        return Wait(reason, in_the_way=victims, choice=choice, chooser=chooser)

    # ------------------------------------------------------------------ replicas of the model

    def coming(self, waiting: Waiting) -> list[Replica]:
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

    def free_among(self, coming: Sequence[Replica], waiting: Waiting) -> Replica | None:
        """Of the replicas that will serve the request, a ready one with a free slot: one on GPUs, unless requests for
        other models wait, which may need these; one that knows how the prompt begins; else the one with the fewest
        requests, of such the most recently used. A request under which a runner ended gets a replica to itself."""
        suspects = self._fleet.suspects
        able = [r for r in coming if r.free_slots > 0 and not suspects.has_to_itself(r.replica_id)]
        if able and suspects.knows(waiting.model, waiting.fingerprint):
            accused = suspects.accused(waiting.model, waiting.fingerprint)
            able = [] if accused else [replica for replica in able if not replica.busy]
        if len(able) < 2:
            return able[0] if able else None
        contended = any(head.model != waiting.model for head in self._queue.heads())

        def fitness(replica: Replica) -> tuple[bool, bool, int, float]:
            knows_prompt = bool(waiting.prefix) and waiting.prefix in replica.prefixes
            on_gpus = contended or replica.placement.tier in ON_GPU
            return on_gpus, knows_prompt, -len(replica.leases), replica.last_used_at

        return max(able, key=fitness)
