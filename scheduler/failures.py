"""What becomes of a load that failed and of a replica that died: its end, and whom it counts against.

A failed load counts against the model: after some, it is paused. A death counts against the model too, unless a request
is found to be what replicas die of (`suspects`).
"""

from __future__ import annotations

from scheduler import events as ev
from scheduler.cluster.models import Model, Models
from scheduler.cluster.replica import ReplicaState
from scheduler.dispatch import Dispatch
from scheduler.fleet import Fleet
from scheduler.outbox import Outbox


class Failures:
    """Belongs to the core."""

    def __init__(self, fleet: Fleet, models: Models, dispatch: Dispatch, outbox: Outbox) -> None:
        self._fleet = fleet
        self._models = models
        self._dispatch = dispatch
        self._out = outbox

    def failed(self, event: ev.ReplicaFailed, now: float) -> None:
        """A load did not happen."""
        replica = self._fleet.replicas.get(event.replica_id)
        if replica is None or replica.state is not ReplicaState.LOADING:
            return
        self._dispatch.look_again()
        self._out.announce("load_failed", f"{replica.model} did not load: {event.message}", replica=replica)
        self._fleet.stop(replica, event.message)
        model = self._models.by_name.get(replica.model)
        if model is None:
            return
        if event.kind == "underestimated" and event.buffers is not None:
            self._fleet.charges.learn_prediction(replica, event.buffers)
            return  # no failure of the model: the next plan reserves what llama.cpp wants
        if event.kind == "invalid_model":
            copy = model.copies.get(replica.placement.node_id)
            if copy is not None and copy.file.path == replica.path:
                self._models.shaped(replica.placement.node_id, copy.files, None, invalid=event.message)
            return
        if event.kind == "out_of_memory":
            model.history.out_of_memory(max(replica.placement.device_bytes, default=0))
        self._count(model, event.message, now)
        self._fleet.charges.remember_extra(model)

    def died(self, event: ev.ReplicaDied, now: float) -> None:
        """A replica can serve no longer; nothing happens for one that is being stopped."""
        replica, suspects = self._fleet.replicas.get(event.replica_id), self._fleet.suspects
        if replica is None or replica.state in (ReplicaState.PENDING, ReplicaState.STOPPING):
            return
        if not event.by_itself:
            suspects.forget(replica.replica_id)
        answering = event.by_itself and (replica.busy or suspects.accuses(replica.replica_id))
        leases = self._fleet.leases.of(replica) if event.by_itself else ()
        fingerprints = [lease.fingerprint for lease in leases]
        guilty = suspects.died(replica.replica_id, replica.model, fingerprints, event.reason, now)
        reason = f"its process ended while answering: {event.reason}" if answering else event.reason
        self._out.announce("replica_died", f"{replica.model} died: {reason}", replica=replica)
        self._fleet.abandon(replica, reason)
        self._dispatch.look_again()
        for name, fingerprint in guilty:
            self._out.announce("request_condemned", f"a request for {name} is refused from now on: {reason}", name)
            self._dispatch.refusals.refuse_condemned(name, fingerprint, now)
        model = self._models.by_name.get(replica.model)
        if model is not None and not guilty:
            self._count(model, reason, now)

    def _count(self, model: Model, message: str, now: float) -> None:
        pauses = model.history.pauses
        model.history.failed(message, self._fleet.policy, now)
        if model.history.pauses > pauses:
            pause_s = model.history.retry_at - now
            self._out.announce("model_paused", f"{model.name} is not loaded again for {pause_s:.0f} s", model.name)
