"""Which beginnings several prompts had: a system prompt, tools, an earlier turn of the same chat.

Of each prompt hashes are kept, of its first 64, 128, 192 … tokens. What a second prompt brings again, they share.
Cost: 2 ms and 1,600 hashes for a prompt of 100,000 tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b

from actors.serving.model import Adapters
from actors.serving.pieces import folded

BLOCK = 64
"""Tokens from one hash to the next. A beginning is known to fewer tokens than that."""

MOST_HASHES = 16_384
"""Of a million tokens. They take 2 MB."""


class Beginnings:
    """Of the prompts that a replica was given lately."""

    def __init__(self) -> None:
        self._seen: OrderedDict[bytes, bool] = OrderedDict()  # whether a second prompt had it

    def note(self, prompt: Sequence[int], adapters: Adapters) -> int:
        """A request came with it. Returns how many of its first tokens an earlier one had, too."""
        shared = 0
        hashes = list(_hashes(prompt, adapters))
        for number, digest in enumerate(hashes):
            if digest in self._seen:
                self._seen[digest] = True
                shared = (number + 1) * BLOCK
        for digest in reversed(hashes):  # a longer beginning is forgotten before its own beginning is
            self._seen.setdefault(digest, False)
            self._seen.move_to_end(digest)
        while len(self._seen) > MOST_HASHES:
            self._seen.popitem(last=False)
        return shared

    def shared(self, tokens: Sequence[int], adapters: Adapters) -> int:
        """How many of the first tokens at least two requests began with."""
        number = 0
        for digest in _hashes(tokens, adapters):
            if not self._seen.get(digest, False):
                break
            number += 1
        return number * BLOCK


def _hashes(tokens: Sequence[int], adapters: Adapters) -> Iterator[bytes]:
    numbers = folded(tokens)
    content, step = memoryview(numbers).cast("B"), BLOCK * numbers.itemsize
    digest = blake2b(repr(adapters).encode(), digest_size=16)
    for start in range(0, len(content) - step + 1, step):
        digest.update(content[start : start + step])
        yield digest.digest()
