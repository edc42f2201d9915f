"""What a vocabulary takes in host RAM: llama.cpp keeps every token several times, in hash tables and strings.

From the structures of src/llama-vocab.cpp and the sizes of libstdc++ and glibc's malloc on 64-bit Linux. Checked with
`mallinfo2` against six vocabularies of llama.cpp's own models: within 4 % (docs/costs.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.costs.header import Array
from scheduler.costs.metadata import Metadata

_BUCKETS = (
    13, 29, 59, 127, 257, 541, 1109, 2357, 5087, 10273, 20753, 42043, 85229, 172933, 351061, 712697, 1447153, 2938679,
    5967347,
)  # fmt: skip
"""Sizes that a `std::unordered_map` grows through."""
_TOKEN_BYTES = 40 + 64 + 32 + 8
"""`id_to_token`, a node of `token_to_id`, `cache_token_to_piece`, and what the context keeps per token."""
_MERGE_BYTES = 96
_TRIE_NODE_BYTES = 112
_TRIE_NODES_PER_TOKEN = 3.2
"""Distinct beginnings of tokens; 3.1 in the largest vocabulary that was looked at."""
_UNICODE_BYTES = 2 * 0x110000
"""Flags of all code points, once a pre-tokenizer has run."""
_STRING_BYTES = 32
_TRIES = frozenset({"t5", "rwkv", "plamo2"})


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Counts of the tokenizer's lists, and the bytes of their texts."""

    model: str
    """llama.cpp's name of the kind of tokenizer: gpt2, llama, bert, t5 …"""
    n_tokens: int
    text_bytes: int
    n_merges: int
    merge_bytes: int

    @property
    def resident_bytes(self) -> int:
        """What the loaded model keeps."""
        total = _TOKEN_BYTES * self.n_tokens + 8 * _bucket(self.n_tokens) + 2 * self.text_bytes
        if self.n_merges:
            total += _MERGE_BYTES * self.n_merges + 8 * _bucket(self.n_merges) + _UNICODE_BYTES
        if self.model in _TRIES:
            total += int(_TRIE_NODE_BYTES * min(self.text_bytes, _TRIE_NODES_PER_TOKEN * self.n_tokens))
        return total

    @property
    def loading_bytes(self) -> int:
        """What reading the header takes besides: all strings, and the list just read once more."""
        strings = _STRING_BYTES * (self.n_tokens + self.n_merges + max(self.n_tokens, self.n_merges))
        return strings + 8 * self.n_tokens + self.text_bytes + self.merge_bytes


def read_vocabulary(meta: Metadata, n_vocab: int) -> Vocabulary:
    """The vocabulary that `meta` describes; one without lists has `n_vocab` tokens all the same."""

    def strings(key: str) -> tuple[int, int]:
        value = meta.values.get(f"tokenizer.ggml.{key}")
        return (value.length, value.n_bytes) if isinstance(value, Array) and value.type == "string" else (0, 0)

    n_tokens, text_bytes = strings("tokens")
    model = meta.values.get("tokenizer.ggml.model", "")
    return Vocabulary(str(model), max(n_tokens, n_vocab), text_bytes, *strings("merges"))


def _bucket(n: int) -> int:
    return next((bucket for bucket in _BUCKETS if bucket >= n), n)
