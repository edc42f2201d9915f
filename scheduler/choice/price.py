"""What a placement costs, in seconds: the one currency in which plans are compared with each other.

    wait      until the replicas in the way have finished what they are doing
    release   until their memory is really back
    load      reading the file
    service   the requests that a replica usually answers before it goes, at the speed of the layout
    regret    for each victim, its load again, as likely as it is wanted soon

Regret follows recency: somebody who asked `t` seconds ago comes back within `SOON_S` with chance SOON_S / (SOON_S + t).
With equal loads, that makes the least recently used model the cheapest victim.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scheduler.choice.speeds import Speed, Speeds
from scheduler.cluster.models import Models
from scheduler.cluster.replica import Placement, Replica, ReplicaState
from scheduler.costs.shape import ModelShape
from scheduler.units import ReplicaId

PROMPT_TOKENS = 512
ANSWER_TOKENS = 256
REQUESTS = 4
"""A usual request, and how many there usually are: a conversation of some turns. Assumptions of this module."""
RELEASE_S = 0.5
"""From stopping a replica until its device shows the memory: what a runner's end takes, an assumption as well."""
SOON_S = 300.0


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
    """Reads speeds and models."""

    def __init__(self, speeds: Speeds, models: Models) -> None:
        self._speeds = speeds
        self._models = models

    def of(
        self,
        shape: ModelShape,
        model: str,
        placement: Placement,
        victims: Iterable[ReplicaId],
        replicas: Mapping[ReplicaId, Replica],
        now: float,
    ) -> Price:
        """Of putting `model` there once the `victims` are gone."""
        speed = self._speed(model, shape, placement)
        gone = [replicas[victim] for victim in victims]
        return Price(
            wait_s=max((self._busy_s(replica) for replica in gone), default=0.0),
            release_s=RELEASE_S if gone else 0.0,
            load_s=speed.load.seconds,
            service_s=_service_seconds(speed),
            regret_s=sum(self._regret_s(replica, now) for replica in gone),
        )

    def service(self, shape: ModelShape, model: str, replica: Replica) -> Price:
        """Of being served by a replica that is there, once it has a free slot."""
        wait_s = 0.0 if replica.free_slots else self._busy_s(replica)
        return Price(wait_s, 0.0, 0.0, _service_seconds(self._speed(model, shape, replica.placement)), 0.0)

    def keeping(self, replica: Replica, now: float) -> float:
        """What it is worth to keep a replica: requests that its model gets, times seconds of a load, for each byte."""
        model, shape = self._models.by_name.get(replica.model), self._shape(replica.model)
        if model is None or shape is None:
            return 0.0
        placement = replica.placement
        load_s = self._speed(replica.model, shape, placement).load.seconds
        return model.popularity.at(now) * load_s / max(1, sum(placement.device_bytes) or placement.host_bytes)

    def _busy_s(self, replica: Replica) -> float:
        """Until the replica has finished what it is doing: half a usual request, a load and one that follows it."""
        shape = self._shape(replica.model)
        coming = replica.state in (ReplicaState.PENDING, ReplicaState.LOADING)
        if shape is None or not (replica.busy or coming):
            return 0.0
        speed = self._speed(replica.model, shape, replica.placement)
        request_s = (_service_seconds(speed) or 0.0) / REQUESTS
        return speed.load.seconds + request_s if coming else 0.5 * request_s

    def _regret_s(self, replica: Replica, now: float) -> float:
        shape = self._shape(replica.model)
        if shape is None:
            return 0.0
        idle_s = 0.0 if replica.busy else max(0.0, now - replica.last_used_at)
        return self._speed(replica.model, shape, replica.placement).load.seconds * SOON_S / (SOON_S + idle_s)

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
