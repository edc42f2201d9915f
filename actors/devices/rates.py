"""How fast this machine reads its memory and computes, measured in a tenth of a second when a node joins.

Predictions of speed start from these figures. What replicas measure corrects them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from scheduler.costs.params import Rates

_READ_BYTES = 32 << 20  # per core: more than its caches hold
_SIDE = 768
_ROUNDS = 3


def cpu_rates(n_cores: int) -> Rates:
    """Of all cores together: bytes read from RAM per second, and F32 operations per second of a matrix product."""
    parts = [np.ones(_READ_BYTES // 4, np.float32) for _ in range(n_cores)]
    with ThreadPoolExecutor(n_cores) as pool:
        read_s = _best(lambda: list(pool.map(np.sum, parts)))
    matrix = np.ones((_SIDE, _SIDE), np.float32)
    product_s = _best(lambda: matrix @ matrix)
    return Rates(bytes_per_s=n_cores * _READ_BYTES / read_s, flops=2 * _SIDE**3 / product_s)


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few rounds."""
    seconds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
