"""The history of a model's loads: failures, the pauses after them, and the extra memory after an out-of-memory error.

After `max_load_attempts` failures in a row there is a pause, twice as long each time. From the first pause until the
model has served a request, no replica is evicted for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scheduler.config import Policy
from scheduler.units import MIB

OUT_OF_MEMORY_STEP_BYTES = 64 * MIB
OUT_OF_MEMORY_SHARE = 10  # a tenth of the largest share, if that is more
LONGEST_PAUSE_S = 600.0
HALF_LIFE_S = 600.0
"""After this time without a request, a model counts as half as popular."""


@dataclass(slots=True)
class Popularity:
    """How often a model is requested: a decaying count of its requests."""

    count: float = 0.0
    counted_at: float = 0.0

    def asked(self, now: float) -> None:
        self.count, self.counted_at = self.at(now) + 1, now

    def at(self, now: float) -> float:
        return self.count * math.pow(0.5, max(0.0, now - self.counted_at) / HALF_LIFE_S)

    def mean_gap_s(self, now: float) -> float:
        """Seconds between requests, if they came at a steady rate r (its count is r x HALF_LIFE_S / ln 2)."""
        count = self.at(now)
        return HALF_LIFE_S / (math.log(2) * count) if count > 0 else math.inf


@dataclass(slots=True)
class ServiceTime:
    """How long requests hold a slot: a running mean in seconds. The newest one counts at least an eighth."""

    mean_s: float = 0.0
    samples: int = 0

    def took(self, seconds: float) -> None:
        self.samples += 1
        self.mean_s += (seconds - self.mean_s) / min(self.samples, 8)


@dataclass(slots=True)
class LoadHistory:
    """`extra_bytes` is added to the model's need on each device after an out-of-memory error, until the next pause."""

    failures: int = 0  # since the last pause or success
    pauses: int = 0  # since the last success
    retry_at: float = 0.0
    last_failure: str = ""
    extra_bytes: int = 0

    @property
    def may_evict(self) -> bool:
        return self.pauses == 0

    def failed(self, message: str, policy: Policy, now: float) -> None:
        self.failures += 1
        self.last_failure = message
        if self.failures >= policy.max_load_attempts:
            self.pause(policy, now)

    def out_of_memory(self, largest_share_bytes: int) -> None:
        self.extra_bytes += max(OUT_OF_MEMORY_STEP_BYTES, largest_share_bytes // OUT_OF_MEMORY_SHARE)

    def pause(self, policy: Policy, now: float) -> None:
        """No attempt before `retry_at`. The next attempt uses the prediction without extra memory."""
        self.retry_at = now + min(policy.backoff_s * 2**self.pauses, LONGEST_PAUSE_S)
        self.failures, self.pauses, self.extra_bytes = 0, self.pauses + 1, 0

    def served(self) -> None:
        """A request was served to its end, so earlier failures no longer count."""
        self.failures, self.pauses, self.retry_at = 0, 0, 0.0
