"""Requests during which runners ended: the suspected ones, and those that are refused because it happened again.

When a runner ends, all its answers end. So at first every request on it is a suspect, also one whose client has just
left: it may still be computed. A suspect is tried once more, alone: meanwhile, no other request gets a slot of that
replica. If that runner ends, too, the request is *condemned*: it is refused, with the reason, for `REMEMBERED_S`. A
suspect that is served to its end is cleared. After `ALONE_S`, others join it, and then nobody is condemned. A suspect
that was alone for so long, or whose client left meanwhile, is not tried again for `REST_S`, and each time for twice as
long. Else one client could have a replica to itself for ever.

Requests are identified by model and fingerprint. A request without a fingerprint is never suspected.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from scheduler.cluster.leases import Ending
from scheduler.errors import Condemned, Unavailable
from scheduler.units import ReplicaId

REMEMBERED_S = 3600.0
"""After this time, a condemned request is tried again: the cause may have been another one, such as faulty memory."""
ALONE_S = 30.0
"""A suspect has a replica to itself for so long. A request that ends its runner does so when it is read, or soon after
that. Other requests must not wait for the end of a long answer."""
LEFT_S = 10.0
"""After its client has left, a request may still be computed for so long: until the end of its batch. On a GPU a batch
cannot be stopped. A guess, well above the time of a batch."""
REST_S = 60.0
"""After its first trial without an end. A guess: several times as long as others have waited for it."""
MOST_REMEMBERED = 4096
"""Beyond this number, the oldest suspects are forgotten first."""

Key = tuple[str, str]


@dataclass(slots=True)
class _Record:
    seen_at: float
    condemned: str = ""  # why, or empty while it is a suspect
    n_trials: int = 0  # without an end
    rests_until: float = 0.0


@dataclass(slots=True)
class _Trial:
    key: Key
    until: float


class Suspects:
    """Belongs to the fleet. Times are seconds of the core's clock."""

    def __init__(self) -> None:
        self._records: dict[Key, _Record] = {}
        self._accused: dict[ReplicaId, set[Key]] = {}
        self._left: dict[ReplicaId, dict[Key, float]] = {}  # whose clients left, and when
        self._trials: dict[ReplicaId, _Trial] = {}

    def knows(self, model: str, fingerprint: str) -> bool:
        """Whether a runner ended during the request, or may have ended."""
        return bool(fingerprint) and ((model, fingerprint) in self._records or self.accused(model, fingerprint))

    def accused(self, model: str, fingerprint: str) -> bool:
        """Whether a replica that failed the request is still being checked."""
        return any((model, fingerprint) in there for there in self._accused.values())

    def accuses(self, replica_id: ReplicaId) -> bool:
        """Whether the replica failed a request and is being checked, or may still compute one whose client has left."""
        return replica_id in self._accused or replica_id in self._left

    def verdict(self, model: str, fingerprint: str, now: float) -> Condemned | Unavailable | None:
        """The error with which the request is refused; None if it is not refused."""
        record = self._records.get((model, fingerprint))
        if record is not None and now < record.rests_until:
            left_s = record.rests_until - now
            return Unavailable(
                f"a process of {model} ended while it answered this request. It was tried again alone, and not to its "
                f"end; next try in {left_s:.0f} s",
                retry_after_s=left_s,
                model=model,
            )
        if record is None or not record.condemned:
            return None
        if now - record.seen_at >= REMEMBERED_S:
            del self._records[model, fingerprint]
            return None
        return Condemned(
            f"two processes of {model} ended while they answered this request, the last one with this request alone "
            f"({record.condemned}); it is not tried again: change the request",
            model=model,
        )

    # ------------------------------------------------------------------ what happens to a request

    def granted(self, replica_id: ReplicaId, model: str, fingerprint: str, now: float) -> None:
        """A slot was granted. From now on, a suspect is alone on the replica."""
        if self.knows(model, fingerprint):
            self._trials[replica_id] = _Trial((model, fingerprint), now + ALONE_S)

    def has_to_itself(self, replica_id: ReplicaId) -> bool:
        """Whether a suspect is being tried on the replica."""
        return replica_id in self._trials

    def released(self, replica_id: ReplicaId, model: str, fingerprint: str, ending: Ending, now: float) -> None:
        """The slot was given back. If the replica failed the request, it may have died because of it. Until this is
        known, no other request gets the replica. If a client has left, its request may still be computed."""
        key, trial = (model, fingerprint), self._trials.get(replica_id)
        if not fingerprint:
            return
        if ending == "failed":
            self._accused.setdefault(replica_id, set()).add(key)
        elif ending == "left":
            self._left.setdefault(replica_id, {})[key] = now
            if trial is not None and trial.key == key:
                trial.until = min(trial.until, now + LEFT_S)
        else:
            self._records.pop(key, None)
            if trial is not None and trial.key == key:
                del self._trials[replica_id]

    def age(self, now: float) -> list[Key]:
        """Ends the trials that have lasted too long. Returns whose: others may have their replicas now."""
        for replica_id, left in list(self._left.items()):
            self._left[replica_id] = {key: at for key, at in left.items() if now - at < LEFT_S}
            if not self._left[replica_id]:
                del self._left[replica_id]
        over = [replica_id for replica_id, trial in self._trials.items() if now >= trial.until]
        ended = [self._trials.pop(replica_id).key for replica_id in over]
        for key in ended:
            record = self._records.get(key)
            if record is not None:
                record.rests_until = now + REST_S * 2.0 ** min(record.n_trials, 10)
                record.n_trials += 1
        return ended

    # ------------------------------------------------------------------ what happened to the replica

    def forget(self, replica_id: ReplicaId) -> None:
        """The replica is alive, or was lost with its machine: the request did not cause the failure."""
        for there in (self._accused, self._left, self._trials):
            there.pop(replica_id, None)

    def died(self, replica_id: ReplicaId, model: str, answering: Iterable[str], reason: str, now: float) -> set[Key]:
        """The replica's process ended while it answered requests with these fingerprints. Requests that it failed just
        before count, too, and those whose clients have just left. Returns the requests that are condemned by this."""
        seen = {(model, fingerprint) for fingerprint in answering if fingerprint}
        seen |= self._accused.pop(replica_id, set())
        seen |= {key for key, at in self._left.pop(replica_id, {}).items() if now - at < LEFT_S}
        trial = self._trials.pop(replica_id, None)
        was_alone = trial is not None and seen == {trial.key}
        condemned = seen & self._records.keys() if was_alone else set()
        for key in seen:
            self._records.setdefault(key, _Record(now)).seen_at = now
        for key in condemned:
            self._records[key].condemned = reason
        while len(self._records) > MOST_REMEMBERED:
            del self._records[next(iter(self._records))]
        return condemned
