"""What a placement costs, in seconds: the currency in which placements are compared.

    wait      until the replicas in the way have finished what they are doing
    release   until their memory is really back
    load      reading the file
    service   the requests that a replica usually answers before it goes, at the speed of the layout
    regret    for each victim, its load again, as likely as it is wanted soon

Somebody who is expected back in `t` seconds is expected soon with chance SOON_S / (SOON_S + t). What `t` is, the
eviction policy says: `lru` takes the seconds since the model was last used, `gdsf` (greedy dual size frequency) the
mean time between its requests, in a count that fades. With equal loads, `lru` makes the least recently used the
cheapest victim. A second replica of a model is not regretted at all: the first one serves on. Each step of a model's
priority doubles what it is regretted.
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
"""A usual request, and how many there usually are: a conversation of some turns. Assumptions of this module."""
RELEASE_S = 0.5
"""From stopping a replica until its device shows the memory: what a runner's end takes, an assumption as well."""
SOON_S = 300.0
TIE_BREAK = 1e-7  # for each second of loading again: of replicas that were used at the same time the cheapest goes
COMING_BACK_S = 2.0
"""What a model that has to be loaded again costs besides the load: room has to be made for it, too. An assumption."""


@dataclass(frozen=True, slots=True)
class Price:
    """All in seconds. `service_s` is None where a device does not tell its rates, and `total_s` then lacks it."""

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
        """Of putting `model` there once the `victims` are gone."""
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
        """Of being served by a replica that is there, once it has a free slot."""
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
        """By what victims are chosen: the least goes first. With `lru`, how likely it is wanted soon and nothing else,
        so that of replicas that would do alike the least recently used goes; with `gdsf` the regret in seconds."""
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
        """Whether its model is served by others, as many as it shall have at least: those that were used last stay."""
        there = [r for r in self.replicas.of_model(replica.model) if r.open and r.state is ReplicaState.READY]
        model = self._models.by_name.get(replica.model)
        least = max(1, self._models.params(model).min_replicas or 0 if model else 0)
        if len(there) <= least:
            return replica not in there and len(there) == least
        there.sort(key=lambda each: (each.last_used_at, each.replica_id), reverse=True)
        return replica not in there[:least]

    def _busy_s(self, replica: Replica) -> float:
        """Until the replica has finished what it is doing: half a request, a load and one that follows it."""
        shape = self._shape(replica.model)
        coming = replica.state in (ReplicaState.PENDING, ReplicaState.LOADING)
        if shape is None or not (replica.busy or coming):
            return 0.0
        request_s = self.request_s(shape, replica.model, replica.placement)
        load_s = self._speed(replica.model, shape, replica.placement).load.seconds if coming else 0.0
        return load_s + request_s if coming else 0.5 * request_s

    def request_s(self, shape: ModelShape, model: str, placement: Placement) -> float:
        """How long a request holds a slot: as seen lately, or a usual one at the speed of the layout."""
        seen = self._models.by_name[model].service if model in self._models.by_name else None
        if seen is not None and seen.samples:
            return seen.mean_s
        return (_service_seconds(self._speed(model, shape, placement)) or 0.0) / REQUESTS

    def tokens_per_s(self, shape: ModelShape, model: str, placement: Placement) -> float | None:
        """Of an answer; None where a device does not tell its rates."""
        answer = self._speed(model, shape, placement).answer
        return 1 / answer.seconds if answer is not None else None

    def usual_request_s(self, shape: ModelShape, model: str, placement: Placement) -> float:
        """Of a usual request at the speed of the layout; 0 where that is not known."""
        return (_service_seconds(self._speed(model, shape, placement)) or 0.0) / REQUESTS

    def measured_load_s(self, shape: ModelShape, model: str, placement: Placement) -> float:
        """How long a load takes there, as far as that was measured or the disk is known; else 0."""
        known = self._models.by_name.get(model)
        copy = known.copies.get(placement.node_id) if known else None
        fraction = copy.file.cached_fraction if copy else None
        if not self._speeds.knows_loads(shape, placement.node_id, fraction):
            return 0.0
        return self._speeds.load(shape, placement.node_id, fraction).seconds

    def least_load_s(self, model: Model, shape: ModelShape, enough_s: float) -> float:
        """The same on the machine where it is the least; or on any where it is no more than `enough_s`."""
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
    """None where the speed is not known."""
    if speed.answer is None or speed.prompt is None:
        return None
    return REQUESTS * (PROMPT_TOKENS * speed.prompt.seconds + ANSWER_TOKENS * speed.answer.seconds)
