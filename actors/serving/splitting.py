"""How llama.cpp divides a batch where sequences carry recurrent states: a piece has as many rows of each of them.

It computes the pieces one after the other. A piece may move the states of sequences that are not in it to other cells,
and leaves their copies where they were. So copies are those of the last piece only, and whoever wants to go back to one
gives llama.cpp a batch that is a single piece, and goes back before the next one.
Source in llama.cpp: `split_equal` in src/llama-batch.cpp, `find_slot` in src/llama-memory-recurrent.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping


def in_pieces(counts: Mapping[int, int], *, in_order: bool) -> list[list[int]]:
    """Sequences that may share a batch which is computed in one piece. `counts`: the rows of each, in the order of the
    batch. `in_order`: the cache has a stream for each sequence, and then a piece has no gaps between their numbers."""
    found: dict[int, list[list[int]]] = {}
    for sequence, n_rows in counts.items():
        runs = found.setdefault(n_rows, [[]])
        if in_order and runs[-1] and runs[-1][-1] + 1 != sequence:
            runs.append([])
        runs[-1].append(sequence)
    return [run for runs in found.values() for run in runs]
