"""Prompts with pictures and sounds in them.

A prompt is a list of tokens. What is no text takes as many of them as it takes cells of the cache. They are negative,
made from a hash of what it is, how long it is, and their place in it. So equal tokens mean equal pictures, all of them:
what finds equal beginnings needs to know nothing of pictures, and no beginning ends inside one.
These numbers have 128 bits. What must be small knows them by 31 of these (`folded`), and only looks for candidates.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

from actors.serving.dialogue import SIZE, Kind, Senses
from scheduler.errors import Rejected


class Medium:
    """A picture, a tile of one, or a stretch of sound.

    `n_positions`: by how much the position of what follows grows; less than its tokens where positions have two
    dimensions (M-RoPE). `embedding`: what its projector made of it, until the model has read it. `chunk`: libmtmd's.
    `at_once`: its parts see each other, so the model must read it in one piece. `is_sound`: not a picture.
    """

    def __init__(
        self,
        identity: bytes,
        n_tokens: int,
        n_positions: int,
        chunk: Any,
        *,
        at_once: bool = False,
        is_sound: bool = False,
    ) -> None:
        digest = blake2b(identity + b"%d" % n_tokens, digest_size=16).digest()
        self._first = -1 - int.from_bytes(digest, "big")
        self.n_tokens = n_tokens
        self.n_positions = n_positions
        self.chunk = chunk
        self.at_once = at_once
        self.is_sound = is_sound
        self.embedding: Any = None

    @property
    def tokens(self) -> list[int]:
        return [self._first - place for place in range(self.n_tokens)]


_FOLDED = 0x7FFF_FFFF


def folded(tokens: Sequence[int]) -> array[int]:
    """The tokens, in 4 bytes each. Other pictures may look like these: whoever compares so must look again."""
    try:
        return array("i", tokens)
    except OverflowError:
        return array("i", [token if token >= 0 else -1 - (-1 - token & _FOLDED) for token in tokens])


def media_runs(tokens: Sequence[int]) -> list[tuple[int, int]]:
    """Where among `tokens` each medium begins, and of how many it is."""
    runs: list[tuple[int, int]] = []
    if min(tokens, default=0) >= 0:
        return runs
    for at, token in enumerate(tokens):
        if token >= 0:
            continue
        if runs and sum(runs[-1]) == at and tokens[at - 1] == token + 1:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((at, 1))
    return runs


class Placed(NamedTuple):
    """A medium, and where in its prompt it begins and ends."""

    start: int
    end: int
    medium: Medium


class Piece(NamedTuple):
    """A part of a medium in a batch: its tokens from `start` to `end`, for `sequence`. `position`: of its beginning."""

    medium: Medium
    start: int
    end: int
    position: int
    sequence: int


class Eyes(Protocol):
    """A model's projector (`media.Projector`). Raises Rejected for what it cannot take."""

    senses: Senses

    def picture(self, width: int, height: int, pixels: bytes) -> Sequence[list[int] | Medium]: ...
    def sound(self, samples: bytes) -> Sequence[list[int] | Medium]: ...


class Reading:
    """Puts a prompt together as its parts come from the preparer. Once it is longer than the slot, no more pictures are
    looked at: it will be refused for its length."""

    def __init__(self, eyes: Eyes | None, n_ctx: int) -> None:
        self._eyes = eyes
        self._n_ctx = n_ctx
        self._tokens: list[int] = []
        self.media: list[Placed] = []
        self.refusal: Rejected | None = None  # to be raised when everything has come

    def add_text(self, payload: bytes) -> None:
        self._tokens += array("i", payload)

    def add_file(self, kind: int, payload: bytes) -> None:
        if self.refusal is not None or len(self._tokens) > self._n_ctx:
            return
        assert self._eyes is not None, "the preparer knows what the model takes"
        try:
            if kind == Kind.PICTURE:
                width, height = SIZE.unpack_from(payload)
                parts = self._eyes.picture(width, height, payload[SIZE.size :])
            else:
                parts = self._eyes.sound(payload)
        except Rejected as error:
            self.refusal = error
            return
        for part in parts:
            start = len(self._tokens)
            if isinstance(part, Medium):
                self._tokens += part.tokens
                self.media.append(Placed(start, len(self._tokens), part))
            else:
                self._tokens += part

    def finish(self, payload: bytes) -> list[int]:
        """The whole prompt; `payload`: its last tokens."""
        self.add_text(payload)
        if self._tokens and self._tokens[-1] < 0:
            self.refusal = Rejected("the prompt ends with a picture or a sound; text must follow it")
        tokens, self._tokens = self._tokens, []
        return tokens


class Places:
    """Where in a prompt pictures and sounds are, and what that does to positions. It holds nothing of them."""

    def __init__(self, spans: Sequence[tuple[int, int, int]]) -> None:
        """`spans`: where each begins and ends, and its positions."""
        self._spans = spans
        self._saved = list(accumulate((end - start - n_positions for start, end, n_positions in spans), initial=0))

    def position(self, count: int) -> int:
        """Of what comes after the first `count` tokens, which end in no picture."""
        return count - self._saved[sum(end <= count for _, end, _ in self._spans)]

    def whole(self, count: int) -> int:
        """So many tokens, or fewer: those before the picture that they would end in."""
        return next((start for start, end, _ in self._spans if start < count < end), count)


NO_PLACES = Places(())


class Media(Places):
    """The pictures and sounds of a prompt, in their places."""

    def __init__(self, placed: Sequence[Placed]) -> None:
        super().__init__([(each.start, each.end, each.medium.n_positions) for each in placed])
        self._placed = placed

    def __bool__(self) -> bool:
        return bool(self._placed)

    @property
    def places(self) -> Places:
        """Without the pictures themselves, which are large."""
        return Places(self._spans) if self._placed else NO_PLACES

    def at(self, count: int) -> Placed | None:
        """What comes, or goes on, after the first `count` tokens; None: text."""
        return next((each for each in self._placed if each.start <= count < each.end), None)

    def text_end(self, start: int, end: int) -> int:
        """Up to where between `start` and `end` there is text only."""
        return min([end, *(max(start, each.start) for each in self._placed if each.end > start)])


NO_MEDIA = Media(())
