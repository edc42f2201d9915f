"""How far measured times were from predicted ones, and what follows for the next prediction.

A correction is a factor, remembered under several keys from the particular to the general (this model in this place;
any model on such hardware). The most particular one that has been measured is taken. It follows the measurements: a
running mean of logarithms in which the newest counts an eighth, or more while there are few. The error is what the
corrected prediction would have missed by, before each measurement was taken in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scheduler.costs.measurements import Record

_MEMORY = 8
_ABSURD = 1000.0
"""A factor beyond this, or its inverse, is a clock that was set, not a pace."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What one answer took while it had the replica to itself: tokens and seconds of prompt and answer, and tokens in
    the context on average while it was written."""

    prompt_tokens: int
    prompt_s: float
    answer_tokens: int
    answer_s: float
    n_past: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """A prediction in seconds. `error` is the mean relative error so far (0.1: a tenth); None before `samples` > 1."""

    seconds: float
    error: float | None
    samples: int


@dataclass(frozen=True, slots=True)
class _Correction:
    log_factor: float
    error: float
    samples: int


class Paces:
    """All corrections. `learn` returns the records to be stored."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._known: dict[str, _Correction] = {}
        self.changes = 0
        """How often what is known has changed."""
        for record in records:
            if record.kind == "pace":
                try:
                    value = record.value
                    found = _Correction(float(value["log_factor"]), float(value["error"]), int(value["samples"]))
                except (KeyError, TypeError, ValueError):
                    continue
                if math.isfinite(found.log_factor) and math.isfinite(found.error) and found.samples > 0:
                    self._known[record.key] = found

    def corrected(self, seconds: float, keys: Sequence[str]) -> Estimate:
        """`seconds` as the formulas have them, corrected by the first of `keys` that was measured."""
        for key in keys:
            known = self._known.get(key)
            if known is not None:
                error = known.error if known.samples > 1 else None
                return Estimate(seconds * math.exp(known.log_factor), error, known.samples)
        return Estimate(seconds, None, 0)

    def learn(self, predicted_s: float, measured_s: float, keys: Sequence[str]) -> list[Record]:
        """It took `measured_s` where the formulas, uncorrected, say `predicted_s`."""
        if not (predicted_s > 0 and 1 / _ABSURD < measured_s / predicted_s < _ABSURD):
            return []
        self.changes += 1
        log_factor = math.log(measured_s / predicted_s)
        records = []
        for key in keys:
            known = self._known.get(key, _Correction(log_factor, 0.0, 0))
            samples = known.samples + 1
            share = 1 / min(samples, _MEMORY)
            missed = math.expm1(abs(log_factor - known.log_factor))
            error_share = 1 / min(max(known.samples, 1), _MEMORY)  # the first measurement had no prediction to miss
            self._known[key] = now = _Correction(
                known.log_factor + share * (log_factor - known.log_factor),
                known.error + error_share * (missed - known.error),
                samples,
            )
            value = {"log_factor": now.log_factor, "error": now.error, "samples": now.samples}
            records.append(Record("pace", key, value))
        return records
