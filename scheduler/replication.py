"""Replicas beyond the first: those that a model must always have, more of a busy model, and one in a faster place.

Only idle replicas are evicted for them.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.choice.layouts import ON_GPU
from scheduler.choice.offer import Offer
from scheduler.choice.placement import Choice
from scheduler.choice.price import RELEASE_S, REQUESTS, SOON_S
from scheduler.choice.workload import Workload
from scheduler.choosers import Choosers
from scheduler.cluster.free_memory import STAYING
from scheduler.cluster.inventory import Inventory
from scheduler.cluster.models import Model, Models
from scheduler.cluster.queue import RequestQueue, Waiting
from scheduler.cluster.replica import Replica, ReplicaState
from scheduler.disks import Disks
from scheduler.errors import ArrieroError
from scheduler.fleet import Fleet
from scheduler.outbox import Outbox
from scheduler.units import ReplicaId, RequestId

LOAD_TIMES_BEFORE_SPREADING = 2.0  # a wait so many times as long as a load is worth another replica
SPREAD_EVERY_S = 1.0  # and is thought about so often
TRY_AGAIN_S = 5.0  # a copy that shall be there and has no place is looked at again
COMPARE_EVERY_S = 10.0  # a better place is looked for so often
CLEARLY_FASTER = 1.25  # what it must be at the least
ON_ITS_WAY = (ReplicaState.PENDING, ReplicaState.LOADING, ReplicaState.STOPPING)


class Replication:
    """Belongs to the dispatch, which says when."""

    def __init__(
        self,
        queue: RequestQueue,
        fleet: Fleet,
        choosers: Choosers,
        inventory: Inventory,
        models: Models,
        outbox: Outbox,
        disks: Disks,
    ) -> None:
        self._queue = queue
        self._fleet = fleet
        self._choosers = choosers
        self._inventory = inventory
        self._models = models
        self._out = outbox
        self._disks = disks
        self._some_are_kept = models.some_are_kept
        self._kept_again_at = 0.0

    # ------------------------------------------------------------------ more of what is loaded

    def spread(self, head: Waiting, coming: Sequence[Replica], now: float) -> bool:
        """Load the model once more, on free GPUs of its own, when that is sooner than the last of its requests would
        have a slot; where there are none, move it if it is in host RAM. Only where speeds are known: on devices that
        share a CPU it would gain nothing. Returns whether a place was sought, which takes its time."""
        model = self._models.by_name.get(head.model)
        if model is None or model.shape is None or now - model.spread_looked_at < SPREAD_EVERY_S:
            return False
        model.spread_looked_at = now
        ours = self._fleet.replicas.of_model(head.model)
        if not model.history.may_evict or not self._may_have_another(model):
            return False
        prices, beside = self._choosers.prices, coming[0].placement
        wait_s = prices.request_s(model.shape, model.name, beside)
        wait_s *= self._queue.length(model.name) / sum(replica.slots for replica in coming)
        if wait_s < LOAD_TIMES_BEFORE_SPREADING * prices.load_s(model.shape, model.name, beside):
            return False
        workload = self._choosers.admission.workload(model, head, now)
        if workload is None or not self._inventory.nodes[beside.node_id].tells_speeds:
            return False
        choice = self.free_place(model, head, workload, ours, now)
        if choice is not None:
            self.place(model, choice, now)
        elif (better := self.better_place(head, coming[0], now)) is not None:
            coming[0].compared_at = now
            self.move(coming[0], better, now)
        return True

    def place(self, model: Model, choice: Choice, now: float) -> Replica:
        """Load the model where the choice says."""
        replica = self._fleet.place(model, choice, now)
        self._disks.stop(replica.placement.node_id)
        return replica

    def beside(self, model: Model, waiting: Waiting, now: float) -> tuple[Offer, ...]:
        """Where another replica of the model could be loaded, if it may have one more."""
        most = self._models.params(model).max_replicas
        ours = self._fleet.replicas.of_model(model.name)
        try:
            workload = self._choosers.admission.workload(model, waiting, now)
        except ArrieroError:
            return ()
        if workload is None or (most is not None and len(ours) >= most):
            return ()
        choice = self.free_place(model, waiting, workload, ours, now)
        return (choice.offer,) if choice and choice.offer else ()

    def free_place(
        self, model: Model, waiting: Waiting, workload: Workload, ours: Sequence[Replica], now: float
    ) -> Choice | None:
        """A place on free GPUs on which none of `ours` lies, if there is one."""
        taken = frozenset(device_id for replica in ours for device_id in replica.placement.device_ids)
        chooser = self._choosers.of(model, waiting, workload.elsewhere(taken), now)
        choice = chooser.when(may_evict=False, outgrown=frozenset()).choose()
        return choice if choice.verdict == "free" else None

    def compares(self, replica: Replica, now: float) -> bool:
        """Whether it is time to look for a better place. Whoever has looked sets `compared_at`."""
        on_gpus = replica.placement.tier in ON_GPU
        return not on_gpus and replica.state is ReplicaState.READY and now - replica.compared_at >= COMPARE_EVERY_S

    def better_place(self, head: Waiting, replica: Replica, now: float) -> Choice | None:
        """A faster place for a replica that lies partly in host RAM. None when no place is known to gain more time than
        loading again costs. Only idle replicas are evicted for it. A busy replica serves on until the other is ready,
        and is not moved while requests for other models wait. It looks only when `compares` says so."""
        model = self._models.by_name.get(head.model)
        if model is None or model.shape is None or not self.compares(replica, now):
            return None
        if replica.busy and self._others_wait(model):
            return None
        if replica.busy and not self._may_have_another(model):
            return None
        try:
            workload = self._choosers.admission.workload(model, head, now)
        except ArrieroError:
            return None
        if workload is None or not self._inventory.nodes[replica.placement.node_id].tells_speeds:
            return None
        # Never a shorter context, even if the request would do with one.
        workload = workload.with_context(replica.placement.context)
        makes_room = frozenset() if replica.busy else frozenset({replica.replica_id})
        choice = self._choosers.of(model, head, workload, now).when(outgrown=makes_room).choose()
        if choice.placement is None or choice.verdict not in ("free", "evict"):
            return None
        prices, shape = self._choosers.prices, model.shape
        before_s = prices.usual_request_s(shape, model.name, replica.placement)
        after_s = prices.usual_request_s(shape, model.name, choice.placement)
        price = prices.of(shape, model.name, choice.placement, choice.victims - {replica.replica_id}, now)
        requests = max(REQUESTS, self._queue.length(model.name), SOON_S / model.popularity.mean_gap_s(now))
        gain_s = requests * (before_s - after_s)
        moving_s = RELEASE_S + price.load_s
        worth_it = after_s * CLEARLY_FASTER < before_s and gain_s > moving_s + price.regret_s
        in_time = replica.busy or 2 * moving_s < head.deadline_at - now
        return choice if worth_it and in_time else None

    def move(self, replica: Replica, choice: Choice, now: float) -> None:
        """Carry that out."""
        assert choice.placement is not None
        message = f"{replica.model} moves from {replica.placement.tier} to {choice.placement.tier}, which is faster"
        self._out.announce("replica_moved", message, replica=replica)
        moved = self.place(self._models.by_name[replica.model], choice, now)
        moved.supersedes = replica.replica_id if replica.busy else None

    def more_than_allowed(self, head: Waiting) -> frozenset[ReplicaId]:
        """The replica that has to go before the model may be loaded once more for the request: of those that cannot
        make room at once, the one with the fewest requests. Empty while the model has fewer than it may have."""
        model = self._models.by_name.get(head.model)
        most = self._models.params(model).max_replicas if model else None
        there = [r for r in self._fleet.replicas.of_model(head.model) if r.state in STAYING and not r.idle]
        if most is None or len(there) < most:
            return frozenset()
        return frozenset({min(there, key=lambda each: (len(each.leases), each.replica_id)).replica_id})

    def _others_wait(self, model: Model) -> bool:
        return any(head.model != model.name for head in self._queue.heads())

    def _may_have_another(self, model: Model) -> bool:
        """Whether the model may have one replica more, and none is on its way."""
        ours, most = self._fleet.replicas.of_model(model.name), self._models.params(model).max_replicas
        return (most is None or len(ours) < most) and all(r.state is ReplicaState.READY for r in ours)

    # ------------------------------------------------------------------ what shall always be there

    def keep_minimum(self, now: float) -> None:
        """Load models with fewer replicas than `min_replicas`. Idle replicas are evicted for a first one only."""
        if not self._some_are_kept or now < self._kept_again_at or not self._inventory.complete:
            return
        for model in sorted(self._models.by_name.values(), key=_size, reverse=True):  # the largest find a place first
            least = self._models.params(model).min_replicas or 0
            ours = self._fleet.replicas.of_model(model.name)
            there = sum(replica.open for replica in ours)
            busy_with_it = self._queue.length(model.name) or any(r.state in ON_ITS_WAY for r in ours)
            if least > there and not busy_with_it and not model.dismissed:
                self._kept_again_at = now + TRY_AGAIN_S
                choice = self._place_to_keep(model, ours, now)
                if choice is not None:
                    self.place(model, choice, now).kept = True

    def _place_to_keep(self, model: Model, ours: Sequence[Replica], now: float) -> Choice | None:
        waiting = of_nobody(model, now)
        try:
            workload = self._choosers.admission.workload(model, waiting, now)
            if workload is None:
                return None
            if ours:
                return self.free_place(model, waiting, workload, ours, now)
            choice = self._choosers.of(model, waiting, workload, now).with_alternatives()
        except ArrieroError:
            return None  # whoever asks for it is told
        return choice if choice.verdict in ("free", "evict") else None


def _size(model: Model) -> int:
    return model.shape.file_bytes if model.shape else 0


def of_nobody(model: Model, now: float) -> Waiting:
    """A request for the model itself, by nobody in particular."""
    return Waiting(RequestId(""), model.name, "load", None, now, now)
