"""What a simulated run came to, in the figures by which policies and clusters are compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scheduler.simulation.simulator import Run
from scheduler.units import DeviceId

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True, slots=True)
class Played:
    """A run among others: of a policy, on a cluster (its name is "" where there is but one)."""

    cluster: str
    policy: str
    run: Run
    cards: Mapping[DeviceId, str]
    """The GPUs' names, where they have one."""

    @property
    def name(self) -> str:
        return f"{self.cluster}, {self.policy}" if self.cluster else self.policy


def summary(run: Run, policy: str, seed: int) -> dict[str, Any]:
    """Counts, bytes, seconds and shares; `tokens_per_s` counts the tokens of all answers over the whole time."""
    served = [outcome for outcome in run.outcomes if outcome.done_s is not None]
    tokens = sum(outcome.tokens for outcome in served)
    return {
        "requests": len(run.outcomes),
        "served": len(served),
        "refused": sum(bool(outcome.refusal) for outcome in run.outcomes),
        "cold_loads": run.cold_loads,
        "bytes_loaded": run.bytes_loaded,
        "evictions": run.evictions,
        "wait_s": quantiles(waits_s(run)),
        "ttft_s": quantiles(first_tokens_s(run)),
        "tokens_per_s": tokens / run.duration_s if run.duration_s > 0 else 0.0,
        "gpu_busy_share": busy_share(run),
        "fairness": fairness(run),
        "policy": policy,
        "seed": seed,
    }


def waits_s(run: Run) -> list[float]:
    """Seconds from arrival to the slot, of each request that got one."""
    return [o.granted_s - o.request.at_s for o in run.outcomes if o.granted_s is not None]


def first_tokens_s(run: Run) -> list[float]:
    """Seconds from arrival to the first token, of each request that got one."""
    return [o.first_token_s - o.request.at_s for o in run.outcomes if o.first_token_s is not None]


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The smallest value that so large a share of them does not exceed; 0 where there are none."""
    ordered = sorted(values)
    if not ordered:
        return dict.fromkeys(QUANTILES, 0.0)
    last = len(ordered) - 1
    return {name: ordered[min(last, max(0, -int(-share * len(ordered) // 1) - 1))] for name, share in QUANTILES.items()}


def busy_share(run: Run) -> float:
    """The share of the whole time, over all GPUs, in which a replica on the GPU was answering."""
    if not run.gpus or run.duration_s <= 0:
        return 0.0
    spans: dict[DeviceId, list[tuple[float, float]]] = defaultdict(list)
    for occupation in run.occupations:
        spans[occupation.gpu] += occupation.busy
    return sum(_covered(each) for each in spans.values()) / (run.duration_s * len(run.gpus))


def fairness(run: Run) -> float:
    """Jain's index over the models' mean times to the first token: 1 when all wait alike, 1/n when one waits alone."""
    times = defaultdict(list)
    for outcome in run.outcomes:
        if outcome.first_token_s is not None:
            times[outcome.request.model].append(outcome.first_token_s - outcome.request.at_s)
    means = [sum(each) / len(each) for each in times.values()]
    squares = sum(mean * mean for mean in means)
    return sum(means) ** 2 / (len(means) * squares) if squares else 1.0


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    total, end = 0.0, float("-inf")
    for begin, until in sorted(spans):
        total += max(0.0, until - max(begin, end))
        end = max(end, until)
    return total
