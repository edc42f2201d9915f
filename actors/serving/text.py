"""Text out of token pieces: whole UTF-8 characters only, and never a stop string or the start of one.

A token may end in the middle of a character, and a stop string may span tokens. Both are held back until they are
complete; a stop string cuts the text where it begins. Cost per token: one search of the held text, which is shorter
than the longest stop string plus one piece.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Collects the pieces of one answer. After `stopped` turns true nothing more comes out."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

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
        self._held += text
        cuts = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if cuts:
            self.stopped = True
            shown, self._held = self._held[: min(cuts)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        split = len(self._held) - keep
        shown, self._held = self._held[:split], self._held[split:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at = text.find(stop[0], at + 1)
    return 0
