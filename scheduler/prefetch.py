"""What will probably be asked for next is read into the page cache, or loaded, while nothing else is to be done."""

from __future__ import annotations

from scheduler.choice.layouts import ON_GPU
from scheduler.choice.price import SOON_S
from scheduler.choosers import Choosers
from scheduler.cluster.models import Model, Models
from scheduler.cluster.queue import RequestQueue
from scheduler.disks import Disks
from scheduler.errors import ArrieroError
from scheduler.fleet import Fleet
from scheduler.replication import ON_ITS_WAY, Replication, of_nobody

TRY_AGAIN_S = 5.0  # it is thought about so often


class Prefetch:
    """Belongs to the dispatch, which says when."""

    def __init__(
        self,
        queue: RequestQueue,
        fleet: Fleet,
        choosers: Choosers,
        models: Models,
        replication: Replication,
        disks: Disks,
    ) -> None:
        self._queue = queue
        self._fleet = fleet
        self._choosers = choosers
        self._models = models
        self._replication = replication
        self._disks = disks
        self._policy = fleet.policy.prefetch
        self._again_at = 0.0

    def fetch(self, now: float) -> None:
        """While nobody waits: read ahead, or load, what is asked for most often of all that is not loaded."""
        if self._policy is None or now < self._again_at or len(self._queue):
            return
        if self._fleet.replicas.count(*ON_ITS_WAY):
            return
        self._again_at = now + TRY_AGAIN_S
        likely = sorted(
            (gap_s, model.name)
            for model in self._models.by_name.values()
            if model.popularity.count
            and not self._fleet.replicas.of_model(model.name)
            and not model.dismissed
            and self._models.keep_alive_s(model) is None  # it is to go when nobody uses it
            and (gap_s := model.popularity.mean_gap_s(now)) < SOON_S
        )
        models = [self._models.by_name[name] for _, name in likely]
        if self._policy == "preload" and any(self._preload(model, now) for model in models):
            return
        for model in models:
            self._disks.read(model, now)

    def _preload(self, model: Model, now: float) -> bool:
        waiting = of_nobody(model, now)
        try:
            workload = self._choosers.admission.workload(model, waiting, now)
            choice = self._replication.free_place(model, waiting, workload, (), now) if workload else None
        except ArrieroError:
            return False
        if choice is None or choice.placement is None or choice.placement.tier not in ON_GPU:
            return False
        self._replication.place(model, choice, now).preloaded = True
        return True
