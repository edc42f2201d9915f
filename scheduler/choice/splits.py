"""Splits a row of layers over devices. Each device takes the next layers in the row, at least one.

Layers differ in size: the experts of the first layers may be in host RAM, and layers with windows take less cache. So
sums over the real layers decide, not an average. If a device has room for some layers in a row, it also has room for
any part of them. So filling the devices from the end finds a split if there is one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

Sums = Sequence[int]
"""Bytes of the first 0, 1, 2, ... layers on one kind of device; the last entry is for all layers."""


def shares(sums: Sequence[Sums], counts: Iterable[int]) -> list[int]:
    """Bytes on each device with `counts` layers each; `sums`: one per device."""
    ends = pairwise(accumulate(counts, initial=0))
    return [of[end] - of[begin] for of, (begin, end) in zip(sums, ends, strict=True)]


def split(sums: Sequence[Sums], rooms: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...] | None:
    """Layers per device whose bytes fit in `rooms`. The shares end as near as possible to `wanted` (a number of layers
    for each device but the last). None if there is no such split. None also if a device has no room for a layer when
    its turn comes: then fewer devices are as good."""
    n_layers, last = len(sums[0]) - 1, len(rooms) - 1
    begins = [0] * (last + 1) + [n_layers]  # the earliest layer at which each device's share may begin
    for i in range(last, -1, -1):  # with the later devices full, and one layer left for each earlier device
        begins[i] = max(i, bisect_left(sums[i], sums[i][begins[i + 1]] - rooms[i]))
        if begins[i] >= begins[i + 1]:
            return None
    if begins[0] > 0:
        return None
    ends = [0]
    for i, aim in enumerate(wanted):
        most = min(bisect_right(sums[i], sums[i][ends[i]] + rooms[i]) - 1, n_layers - (last - i))
        end = max(begins[i + 1], min(aim, most))
        if not ends[i] < end <= most:  # a small device between large ones, for which only some layers are small enough
            return tuple(after - before for before, after in pairwise(begins))
        ends.append(end)
    return tuple(after - before for before, after in pairwise((*ends, n_layers)))
