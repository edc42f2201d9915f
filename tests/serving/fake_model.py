"""A fake model for the batcher, whose answers depend on every token that the cache holds.

It is strict: positions must be contiguous, batches bounded, and a token comes out only of a row that wanted logits. So
an answer is right only if the slot's memory is the prompt and the answer.
"""

from __future__ import annotations

import pickle
import threading
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from actors.serving.batcher import Batcher
from actors.serving.draft import Draft, Guesser
from actors.serving.generation import Generation, Wish
from actors.serving.jobs import Results
from actors.serving.model import Adapters, Row
from actors.serving.pieces import NO_MEDIA, Media, Medium, Piece
from actors.serving.protocol import Chunk
from actors.serving.text import TextStream

END = 0


def next_token(tokens: Sequence[int]) -> int:
    """The fake's language: one token in sixteen ends."""
    mixed = 7
    for token in tokens:
        mixed = (mixed * 31 + token) % 1009
    return mixed % 16


class FakeSampler:
    def __init__(self) -> None:
        self.closed = False
        self.may_end = False

    def allow_the_end(self) -> None:
        self.may_end = True

    def close(self) -> None:
        self.closed = True


class FakeModel:
    n_vocab, n_embd, bos, is_pooled, reads_whole, most_drafted = 1000, 4, -1, False, False, 15

    def __init__(self, n_seq_max: int = 2, n_ubatch: int = 8, can_cut: bool = True, room: int = 10_000) -> None:
        self.n_seq_max, self.n_ubatch, self.can_cut, self.room = n_seq_max, n_ubatch, can_cut, room
        self.n_cells = room
        self.n_outputs = n_seq_max
        self.shares_cells = False
        self.keeps_states = not can_cut
        self.n_copies = 0  # of recurrent states
        self.shares_stream = False
        self.revocable: dict[int, int] = {}
        self.n_stuck = 0  # guesses that could not be taken back
        self.memory: list[list[int]] = [[] for _ in range(n_seq_max)]
        self.codes: list[int] = []  # what the next decodes return
        self.batches: list[list[Row]] = []
        self.seen: list[list[tuple[int, int]]] = []  # of each batch of pictures the sequences, and how many tokens
        self.aborts = threading.Event()
        self.pause: threading.Event | None = None  # decodes wait for it, or for an abort
        self.entered = threading.Event()
        self.threads = 0
        self.adapters: Adapters = ()
        self.warmed_in: threading.Thread | None = None
        self.fault: Exception | None = None  # of warming up
        self.eyes: Any = "open"
        self.guesser: Guesser | None = None
        self.encoded: list[Medium] = []
        self.encode_pause = threading.Event()  # encoding waits for it
        self.encode_pause.set()
        self.was_left = False  # encoding, for so long that something must have waited for it
        self.blindness: Exception | None = None  # of encoding

    def warm_up(self) -> None:
        self.warmed_in = threading.current_thread()
        if self.fault is not None:
            raise self.fault

    def use_adapters(self, adapters: Adapters) -> None:
        assert threading.current_thread() is self.warmed_in
        self.adapters = adapters

    def decode(self, rows: Sequence[Row]) -> int:
        assert threading.current_thread() is self.warmed_in
        assert 0 < len(rows) <= max(self.n_ubatch, self.n_seq_max)
        assert sum(row.wants_logits for row in rows) <= self.n_outputs, "llama.cpp would end the process"
        self.batches.append(list(rows))
        self.entered.set()
        if self.pause is not None:
            while not self.pause.wait(0.001):
                if self.aborts.is_set():
                    return 2
        if self.codes and (code := self.codes.pop(0)):
            return code
        if sum(map(len, self.memory)) + len(rows) > self.room:
            return 1
        self.revocable = self._revocable(rows)
        for row in rows:
            assert row.position == len(self.memory[row.sequence]), "a gap in the sequence"
            self.memory[row.sequence].append(row.token)
        return 0

    def encode(self, medium: Medium) -> None:
        assert threading.current_thread() is not self.warmed_in
        self.encoded.append(medium)
        if not self.encode_pause.wait(10):
            self.was_left = True
        if self.blindness is not None:
            raise self.blindness
        medium.embedding = "seen"

    def decode_media(self, pieces: Sequence[Piece]) -> int:
        assert threading.current_thread() is self.warmed_in
        n_rows = sum(piece.end - piece.start for piece in pieces)
        assert 0 < n_rows <= max(self.n_ubatch, self.n_seq_max) or [each.medium.at_once for each in pieces] == [True]
        assert len({piece.sequence for piece in pieces}) == len(pieces)
        self.seen.append([(piece.sequence, piece.end - piece.start) for piece in pieces])
        if self.codes and (code := self.codes.pop(0)):
            return code
        if sum(map(len, self.memory)) + n_rows > self.room:
            return 1
        for medium, start, end, position, sequence in pieces:
            assert medium.embedding == "seen"
            assert position + start == len(self.memory[sequence])
            assert (start, end) == (0, medium.n_tokens) or not medium.at_once
            self.memory[sequence] += medium.tokens[start:end]
        return 0

    def sample(self, sampler: Any, row: int) -> int:
        assert not sampler.closed
        wanted = self.batches[-1][row]
        assert wanted.wants_logits
        return next_token(self.memory[wanted.sequence][: wanted.position + 1])

    def logits(self, row: int) -> Any:
        """The next token is four times as likely as any other."""
        wanted = self.batches[-1][row]
        assert wanted.wants_logits
        logits = np.zeros(self.n_vocab, np.float32)
        logits[next_token(self.memory[wanted.sequence][: wanted.position + 1])] = np.log(4)
        return logits

    def pick(self, sampler: Any, logits: Any, allowed: Any) -> int:
        assert not sampler.closed and allowed is None
        return int(np.argmax(logits))

    def accept(self, sampler: Any, token: int) -> None:
        assert not sampler.closed

    def embed(self, rows: Sequence[Row]) -> Any:
        code = self.decode_for_vectors(rows)
        return code or np.array([[row.token, 1.0, 0.0, 0.0] for row in rows])

    def decode_for_vectors(self, rows: Sequence[Row]) -> int:
        """A context for embeddings has room for every row's output."""
        self.n_outputs, n_outputs = len(rows), self.n_outputs
        code = self.decode(rows)
        self.n_outputs = n_outputs
        return code

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return b"%d " % token

    def ends_generation(self, token: int) -> bool:
        return token == END

    def cut(self, sequence: int, kept: int, stored: int) -> bool:
        assert len(self.memory[sequence]) == stored, "the slot's tokens are not what the memory holds"
        if kept != stored and not self.can_cut and stored - kept > self.revocable.pop(sequence, 0):
            self.n_stuck += self.n_copies > 0
            return False
        del self.memory[sequence][kept:]
        return True

    @property
    def copies_states(self) -> bool:
        return self.n_copies > 0

    def _revocable(self, rows: Sequence[Row]) -> dict[int, int]:
        """Tokens that can be taken back: of a batch that llama.cpp does not divide."""
        counts = Counter(row.sequence for row in rows)
        follow = all(after == before + 1 for before, after in pairwise(counts))
        if len(set(counts.values())) > 1 or not (follow or self.shares_stream):
            return {}
        return {sequence: min(self.n_copies, count - 1) for sequence, count in counts.items()}

    def clear(self, sequence: int) -> None:
        self.memory[sequence].clear()

    def save_state(self, sequence: int) -> Any:
        return np.array([token & 255 for token in self.memory[sequence]], np.uint8)

    def load_state(self, sequence: int, state: Any, kept: int) -> bool:
        """The rest of what a sequence holds must still be there."""
        assert len(state) == kept and [token & 255 for token in self.memory[sequence][:kept]] == state.tolist()
        del self.memory[sequence][kept:]
        return True

    def sequence_bytes(self, sequence: int) -> int:
        return len(pickle.dumps(self.memory[sequence]))

    def save_sequence(self, sequence: int, into: Any) -> bool:
        assert threading.current_thread() is self.warmed_in
        into[:] = np.frombuffer(pickle.dumps(self.memory[sequence]), np.uint8)
        return True

    def load_sequence(self, sequence: int, state: Any) -> bool:
        assert threading.current_thread() is self.warmed_in and not self.memory[sequence]
        loaded = pickle.loads(state.tobytes())
        if sum(map(len, self.memory)) + len(loaded) > self.room:
            return False
        self.memory[sequence] += loaded
        return True

    def copy_prefix(self, source: int, sequence: int, count: int) -> None:
        assert self.shares_cells and not self.memory[sequence]
        self.memory[sequence] += self.memory[source][:count]

    def set_threads(self, n_threads: int) -> None:
        self.threads = n_threads

    def abort(self, wanted: bool) -> None:
        (self.aborts.set if wanted else self.aborts.clear)()


def job(
    prompt: Sequence[int],
    max_tokens: int = 20,
    name: str = "r",
    source: str = "",
    constraint: Any = None,
    first: Generation | None = None,
    media: Media = NO_MEDIA,
    draft: Draft | None = None,
    **wish: Any,
) -> Generation:
    return Generation(
        name,
        list(prompt),
        Results(),
        FakeSampler(),
        TextStream(),
        Wish(max_tokens, **{"is_extra": first is not None, **wish}),
        constraint=constraint,
        first=first,
        source=source,
        media=media,
        draft=draft,
    )


def submitted(batcher: Batcher, one: Generation) -> Generation:
    batcher.submit(one)
    return one


def expected(prompt: Sequence[int], max_tokens: int) -> tuple[str, str]:
    tokens, said = list(prompt), []
    while len(said) < max_tokens:
        if (token := next_token(tokens)) == END:
            return "".join(said), "stop"
        said.append(f"{token} ")
        tokens.append(token)
    return "".join(said), "length"


def talkative(n_tokens: int, at_least: int, of: int = 2) -> list[int]:
    """A prompt whose answer does not end before `at_least` tokens."""
    prompts = ([*([of] * (n_tokens - 1)), last] for last in range(1, 1000))
    return next(prompt for prompt in prompts if expected(prompt, at_least)[1] == "length")


def heard(chunks: Sequence[Chunk]) -> tuple[str, str]:
    return "".join(chunk.text for chunk in chunks), str(chunks[-1].finish_reason)


class PooledModel(FakeModel):
    """One vector per sequence: of the sum of its tokens."""

    is_pooled = True

    def embed(self, rows: Sequence[Row]) -> Any:
        code = self.decode_for_vectors(rows)
        sums: dict[int, int] = {}
        for row in rows:
            assert row.wants_logits
            sums[row.sequence] = sums.get(row.sequence, 0) + row.token
        return code or np.array([[total, 1.0, 0.0, 0.0] for total in sums.values()])
