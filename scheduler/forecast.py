"""How long a request will wait at the least: what cannot be met is refused at once instead of after its deadline.

    no replica            the load, on the machine where it is quickest
    one that is loading   what is left of that
    all slots taken       whoever is before it in line, at the pace at which requests were served lately

Only what was measured, or is known of a disk, is held against a request.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.choice.price import Prices
from scheduler.cluster.models import Models
from scheduler.cluster.queue import RequestQueue, Waiting
from scheduler.cluster.replica import Replica, ReplicaState
from scheduler.errors import DeadlineExceeded

SEEN = 3  # requests of a model whose pace is believed


class Forecast:
    """Reads queue, models and prices. A request that it is asked about is in the queue, or has the rank of one."""

    def __init__(self, queue: RequestQueue, models: Models, prices: Prices) -> None:
        self._queue = queue
        self._models = models
        self._prices = prices

    def check(self, waiting: Waiting, coming: Sequence[Replica], now: float) -> None:
        """Raise DeadlineExceeded when the request cannot have a slot in time; `coming` are the replicas that would
        serve it."""
        if any(replica.free_slots for replica in coming):
            return
        least_s, why = self._least_wait(waiting, coming, now)
        left_s = waiting.deadline_at - now
        if 0 < left_s < least_s:
            message = f"{waiting.model}: {why} {least_s:.1f} s, but the request's deadline is in {left_s:.1f} s"
            raise DeadlineExceeded(message, retry_after_s=least_s, model=waiting.model)

    def wait_s(self, waiting: Waiting, coming: Sequence[Replica], now: float) -> float:
        """How long the next request like this one would wait, as far as anything is known: at the least, or else as
        long as the queue takes for one request."""
        least_s, _ = self._least_wait(waiting, coming, now)
        return max(least_s, self._queue.seconds_per_place())

    def _least_wait(self, waiting: Waiting, coming: Sequence[Replica], now: float) -> tuple[float, str]:
        model = self._models.by_name.get(waiting.model)
        if model is None or model.shape is None:
            return 0.0, ""
        if not coming:
            left_s = waiting.deadline_at - now
            return self._prices.least_load_s(model, model.shape, left_s), "loading it takes"
        ready = [replica for replica in coming if replica.state is ReplicaState.READY]
        if not ready:
            loads = (self._prices.measured_load_s(model.shape, r.model, r.placement) for r in coming)
            left = (load_s - (now - r.created_at) for load_s, r in zip(loads, coming, strict=True))
            return max(0.0, min(left)), "its load still takes"
        if len(ready) < len(coming) or model.service.samples < SEEN:
            return 0.0, ""
        before = self._queue.before(waiting)
        rounds = before // sum(replica.slots for replica in ready)
        return rounds * model.service.mean_s, f"{before} requests are before it, and take"
