"""The fewest bytes that could have been loaded for a sequence of requests, known as a whole in advance.

All GPUs are taken as one memory that holds whole models. A request whose model is there costs nothing, any other the
model's file. Three answers, each at least as large as the one before it:

    first loads   every model once
    PFOO-L        the flow-based bound of Berger, Beckmann and Harchol-Balter ("Practical Bounds on Optimal Caching with
                  Variable Object Sizes", 2018). From one request to the next of its model, a model either stays, which
                  saves a load and takes its size times the length of the interval, or it does not; the intervals that
                  save the most for what they take are admitted until memory times the length of the sequence is used up
    optimum       the least for a memory that is never exceeded, and where whoever is asked for is there: dynamic
                  programming over the sets of models that may be there, for a dozen models

None of them knows that loading takes time, that several GPUs are not one memory, or that requests overlap. A scheduler
comes out below them by serving in another order, by refusing, or by putting a model into host RAM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations
from typing import NamedTuple


class Item(NamedTuple):
    """What a model takes of the memory, and what is read to load it, in bytes."""

    held_bytes: int
    file_bytes: int


class _Interval(NamedTuple):
    """From one request of a model to the next: byte-requests of memory that staying takes, and bytes that it saves."""

    taken: int
    saved_bytes: int


def first_loads(requests: Sequence[str], items: Mapping[str, Item]) -> int:
    return sum(items[name].file_bytes for name in set(requests))


def pfoo_l(requests: Sequence[str], items: Mapping[str, Item], memory_bytes: int) -> int:
    """Bytes that are loaded at the least, by PFOO-L. Nobody takes more than the whole memory."""
    intervals = _intervals(requests, items, memory_bytes)
    left = memory_bytes * len(requests)
    missed = first_loads(requests, items) + sum(interval.saved_bytes for interval in intervals)
    for taken, saved_bytes in sorted(intervals, key=lambda interval: interval.taken / interval.saved_bytes):
        if taken >= left:
            return missed - int(saved_bytes * left / taken)
        left, missed = left - taken, missed - saved_bytes
    return missed


def _intervals(requests: Sequence[str], items: Mapping[str, Item], memory_bytes: int) -> list[_Interval]:
    found, last = [], dict[str, int]()
    for at, name in enumerate(requests):
        if name in last:
            held_bytes = min(items[name].held_bytes, memory_bytes)
            found.append(_Interval(held_bytes * (at - last[name]), items[name].file_bytes))
        last[name] = at
    return found


def optimum(requests: Sequence[str], items: Mapping[str, Item], memory_bytes: int) -> int:
    """Bytes that are loaded at the least. Nobody takes more than the whole memory."""

    @cache
    def after_loading(there: frozenset[str], name: str) -> tuple[frozenset[str], ...]:
        """Who may be there once `name` has been loaded: whoever could stay does, for nothing is gained by going."""
        left = memory_bytes - items[name].held_bytes
        found: list[frozenset[str]] = []
        for size in range(len(there), -1, -1):
            for staying in map(frozenset, combinations(sorted(there), size)):
                fits = not staying or sum(items[each].held_bytes for each in staying) <= left
                if fits and not any(staying < larger for larger in found):
                    found.append(staying)
        return tuple(staying | {name} for staying in found)

    least: dict[frozenset[str], int] = {frozenset(): 0}
    for name in requests:
        reached: dict[frozenset[str], int] = {}
        for there, loaded in least.items():
            hit = name in there
            total = loaded if hit else loaded + items[name].file_bytes
            for then in (there,) if hit else after_loading(there, name):
                reached[then] = min(total, reached.get(then, total))
        least = reached
    return min(least.values())
