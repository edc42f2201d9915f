"""Text out of token pieces: whole UTF-8 characters only, and never a stop string or the start of one.

A token may end in the middle of a character, and a stop string may span tokens. Both are held back until they are
complete; the stop string that ends first cuts the text where it begins. Cost per token: a few steps for each of its
characters and each stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Collects the pieces of one answer. After `stopped` turns true nothing more comes out. `stopped_by`: which of
    `stops` it was; "" for one of `others`, of which the client knows nothing."""

    def __init__(self, stops: Sequence[str] = (), others: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._told = frozenset(stops)
        self._stops = [_Stop(stop) for stop in (*stops, *others) if stop]
        self._held = ""
        self.stopped = False
        self.stopped_by = ""

    @property
    def is_whole(self) -> bool:
        """Whether no character is cut off at the end of what was pushed."""
        return not self._decoder.getstate()[0]

    def push(self, piece: bytes) -> str:
        """The text that may be shown after this piece; "" when all of it has to wait."""
        return self._release(self._decoder.decode(piece))

    def finish(self) -> str:
        """What was held back, once no more pieces come. Bytes that never became a character show as U+FFFD."""
        if self.stopped:
            return ""
        shown = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return shown

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        if not self._stops:
            return text
        self._held += text
        for at, character in enumerate(text, start=len(self._held) - len(text)):
            ended = [stop for stop in self._stops if stop.follow(character)]
            if ended:
                self.stopped = True
                first = max((stop.text for stop in ended), key=len)
                self.stopped_by = first if first in self._told else ""
                shown, self._held = self._held[: at + 1 - len(first)], ""
                return shown
        split = len(self._held) - max(stop.matched for stop in self._stops)
        shown, self._held = self._held[:split], self._held[split:]
        return shown


class _Stop:
    """A stop string that is looked for character by character, as Knuth, Morris and Pratt do it: whatever it is and
    whatever is said, a character takes a few steps. `matched`: how much of its beginning the text ends with."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._borders = [0]  # of each beginning: its longest end that is a beginning, too
        for character in text[1:]:
            self._borders.append(self._longer(self._borders[-1], character))

    def follow(self, character: str) -> bool:
        """The text goes on with `character`; True when it ends with the stop string now."""
        self.matched = self._longer(self.matched, character)
        return self.matched == len(self.text)

    def _longer(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self.text[matched] == character)
