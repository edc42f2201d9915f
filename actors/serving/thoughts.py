"""What a model thinks before it answers: where it begins and ends in the text, and how long it may take."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class Thoughts:
    """`thinks`: whether the text so far ends in the middle of a thought. `begun`: what the prompt begins the answer
    with."""

    def __init__(self, start_tag: str, end_tags: Sequence[str], begun: str) -> None:
        self._start_tag, self._end_tags = start_tag.encode(), [tag.encode() for tag in end_tags]
        self._longest = max(map(len, (self._start_tag, *self._end_tags)))
        self._said = b""  # the last of it, where a tag may begin
        self.thinks = False
        self.look(begun.encode())

    def look(self, piece: bytes) -> None:
        """The next piece of the text."""
        said, start = self._said + piece, 0
        while True:
            tags = self._end_tags if self.thinks else [self._start_tag]
            ends = [at + len(tag) for tag in tags if (at := said.find(tag, start)) >= 0]
            if not ends:
                break
            self.thinks, start = not self.thinks, min(ends)
        self._said = said[start:][-self._longest :]


class ThinkingBudget:
    """After `n_tokens` of thoughts the model must say `closing`, the tokens of what ends them (`forced`)."""

    def __init__(self, thoughts: Thoughts, n_tokens: int, closing: Sequence[int]) -> None:
        self._thoughts = thoughts
        self._left = n_tokens
        self._closing = closing
        self.forced: deque[int] = deque()
        self._judge(is_whole=True)

    def take(self, piece: bytes, *, is_whole: bool) -> None:
        """The next token's text. `is_whole`: no character is cut off after it, so that the thought may end here."""
        self._left -= self._thoughts.thinks
        self._thoughts.look(piece)
        self._judge(is_whole=is_whole)

    def _judge(self, *, is_whole: bool) -> None:
        if self._thoughts.thinks and self._left <= 0 and is_whole and not self.forced:
            self.forced.extend(self._closing)
