"""The cost of a placement in seconds: the currency in which placements are compared.

    wait      until the replicas in the way have finished their work
    release   until their memory is really free
    load      reading the file
    service   the requests that a replica usually answers before it is evicted, at the speed of the layout
    regret    for each victim, the seconds to load it again, times the probability that it is wanted soon

A model that is expected again in `t` seconds is wanted soon with probability SOON_S / (SOON_S + t). The eviction policy
says what `t` is. `lru` takes the seconds since the model was last used. `gdsf` (greedy dual size frequency) takes the
mean time between its requests, by a decaying count. With equal loads, `lru` makes the least recently used model the
cheapest victim. A second replica of a model has no regret: the first one continues to serve. Each step of a model's
priority doubles its regret.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import fsum, inf

from scheduler.choice.speeds import Speed, Speeds
from scheduler.cluster.models import Model, Models
from scheduler.cluster.replica import Placement, Replica, ReplicaState
from scheduler.cluster.replicas import Replicas
from scheduler.config import Policy
from scheduler.costs.shape import ModelShape
from scheduler.units import ReplicaId

PROMPT_TOKENS = 512
ANSWER_TOKENS = 256
REQUESTS = 4
"""A typical request, and how many a replica serves: a conversation of some turns. Assumptions of this module."""
RELEASE_S = 0.5
"""From the stop of a replica until its device shows the memory as free. Also an assumption."""
SOON_S = 300.0
TIE_BREAK = 1e-7  # per second of loading again: of replicas last used at the same time, the cheapest load is evicted
COMING_BACK_S = 2.0
"""The cost of loading a model again, besides the load itself: it also needs room. An assumption."""


@dataclass(frozen=True, slots=True)
class Price:
    """All in seconds. `service_s` is None if a device does not tell its rates; then it is not part of `total_s`."""

    wait_s: float
    release_s: float
    load_s: float
    service_s: float | None
    regret_s: float

    @property
    def total_s(self) -> float:
        return self.wait_s + self.release_s + self.load_s + (self.service_s or 0.0) + self.regret_s


class Prices:
    """Reads speeds, models and replicas."""

    def __init__(self, speeds: Speeds, models: Models, replicas: Replicas, policy: Policy) -> None:
        self._speeds = speeds
        self._models = models
        self.replicas = replicas
        self._by_frequency = policy.eviction == "gdsf"

    def of(
        self,
        shape: ModelShape,
        model: str,
        placement: Placement,
        victims: Iterable[ReplicaId],
        now: float,
    ) -> Price:
        """The price of loading `model` there after the `victims` are gone."""
        speed = self._speed(model, shape, placement)
        gone = [self.replicas[victim] for victim in victims]
        return Price(
            wait_s=max((self._busy_s(replica) for replica in gone), default=0.0),
            release_s=RELEASE_S if gone else 0.0,
            load_s=speed.load.seconds,
            service_s=_service_seconds(speed),
            regret_s=fsum(self.regret_s(replica, now) for replica in gone if replica.model != model),  # in any order
        )

    def service(self, shape: ModelShape, model: str, replica: Replica) -> Price:
        """The price of being served by a loaded replica, when it has a free slot."""
        wait_s = 0.0 if replica.free_slots else self._busy_s(replica)
        return Price(wait_s, 0.0, 0.0, _service_seconds(self._speed(model, shape, replica.placement)), 0.0)

    def regret_s(self, replica: Replica, now: float) -> float:
        """What stopping the replica will cost."""
        model, shape = self._models.by_name.get(replica.model), self._shape(replica.model)
        if model is None or shape is None or replica.drain_for or self.surplus(replica):
            return 0.0
        again_s = COMING_BACK_S + self.load_s(shape, replica.model, replica.placement)
        return again_s * SOON_S / (SOON_S + self._back_in_s(model, replica, now)) * 2.0 ** self._models.priority(model)

    def worth(self, replica: Replica, now: float) -> float:
        """The value by which victims are chosen, the lowest first. With `lru`, it is how likely the replica is wanted
        soon. So of replicas that would free enough, the least recently used one is evicted. With `gdsf`, it is the
        regret in seconds."""
        regret_s = self.regret_s(replica, now)
        if self._by_frequency or not regret_s:
            return regret_s
        shape = self._shape(replica.model)
        if shape is None:
            return 0.0
        again_s = COMING_BACK_S + self.load_s(shape, replica.model, replica.placement)
        return regret_s / again_s * (1 + TIE_BREAK * again_s)

    def _back_in_s(self, model: Model, replica: Replica, now: float) -> float:
        if replica.preloaded:
            return inf
        if self._by_frequency:
            return model.popularity.mean_gap_s(now)
        return 0.0 if replica.busy else max(0.0, now - replica.last_used_at)

    def surplus(self, replica: Replica) -> bool:
        """Whether its model has enough other replicas, at least `min_replicas`. The most recently used ones stay."""
        there = [r for r in self.replicas.of_model(replica.model) if r.open and r.state is ReplicaState.READY]
        model = self._models.by_name.get(replica.model)
        least = max(1, self._models.params(model).min_replicas or 0 if model else 0)
        if len(there) <= least:
            return replica not in there and len(there) == least
        there.sort(key=lambda each: (each.last_used_at, each.replica_id), reverse=True)
        return replica not in there[:least]

    def _busy_s(self, replica: Replica) -> float:
        """Seconds until the replica has finished: half a request, or its load and the request that follows."""
        shape = self._shape(replica.model)
        coming = replica.state in (ReplicaState.PENDING, ReplicaState.LOADING)
        if shape is None or not (replica.busy or coming):
            return 0.0
        request_s = self.request_s(shape, replica.model, replica.placement)
        load_s = self._speed(replica.model, shape, replica.placement).load.seconds if coming else 0.0
        return load_s + request_s if coming else 0.5 * request_s

    def request_s(self, shape: ModelShape, model: str, placement: Placement) -> float:
        """How long a request holds a slot: as measured recently, or a typical one at the speed of the layout."""
        seen = self._models.by_name[model].service if model in self._models.by_name else None
        if seen is not None and seen.samples:
            return seen.mean_s
        return (_service_seconds(self._speed(model, shape, placement)) or 0.0) / REQUESTS

    def tokens_per_s(self, shape: ModelShape, model: str, placement: Placement) -> float | None:
        """The speed of an answer; None if a device does not tell its rates."""
        answer = self._speed(model, shape, placement).answer
        return 1 / answer.seconds if answer is not None else None

    def usual_request_s(self, shape: ModelShape, model: str, placement: Placement) -> float:
        """Seconds of a typical request at the speed of the layout; 0 if the speed is not known."""
        return (_service_seconds(self._speed(model, shape, placement)) or 0.0) / REQUESTS

    def measured_load_s(self, shape: ModelShape, model: str, placement: Placement) -> float:
        """How long a load takes there, if it was measured or the disk is known; else 0."""
        known = self._models.by_name.get(model)
        copy = known.copies.get(placement.node_id) if known else None
        fraction = copy.file.cached_fraction if copy else None
        if not self._speeds.knows_loads(shape, placement.node_id, fraction):
            return 0.0
        return self._speeds.load(shape, placement.node_id, fraction).seconds

    def least_load_s(self, model: Model, shape: ModelShape, enough_s: float) -> float:
        """The same on the machine with the fastest load; or on any machine where it takes at most `enough_s`."""
        least_s = inf
        for node_id, copy in model.copies.items():
            if not self._speeds.knows_loads(shape, node_id, copy.file.cached_fraction):
                return 0.0
            least_s = min(least_s, self._speeds.load(shape, node_id, copy.file.cached_fraction).seconds)
            if least_s <= enough_s:
                break
        return least_s if least_s < inf else 0.0

    def load_s(self, shape: ModelShape, model: str, placement: Placement) -> float:
        known = self._models.by_name.get(model)
        copy = known.copies.get(placement.node_id) if known else None
        return self._speeds.load(shape, placement.node_id, copy.file.cached_fraction if copy else None).seconds

    def _speed(self, name: str, shape: ModelShape, placement: Placement) -> Speed:
        model = self._models.by_name.get(name)
        copy = model.copies.get(placement.node_id) if model else None
        return self._speeds.predict(shape, placement, copy.file.cached_fraction if copy else None)

    def _shape(self, name: str) -> ModelShape | None:
        model = self._models.by_name.get(name)
        return model.shape if model else None


def _service_seconds(speed: Speed) -> float | None:
    """None if the speed is not known."""
    if speed.answer is None or speed.prompt is None:
        return None
    return REQUESTS * (PROMPT_TOKENS * speed.prompt.seconds + ANSWER_TOKENS * speed.answer.seconds)
