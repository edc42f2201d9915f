"""How many tokens of an answer are thoughts: those whose text the client reads as such.

llama.cpp's parser works on text and does not know of tokens. So the place of each token in the text is kept, and when
the answer has ended, its thoughts are looked for there. Cost of a token: its text is decoded once more.
"""

from __future__ import annotations

import codecs
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

from actors.serving.text import TextStream


class CountedText(TextStream):
    """The text of one answer that is parsed, with the places of its tokens."""

    def __init__(self, stops: Sequence[str] = (), others: Sequence[str] = ()) -> None:
        super().__init__(stops, others)
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._texts: list[str] = []
        self._length = 0  # in whole characters
        self._starts: list[int] = []  # of each token: the first character that it is in
        self._ends: list[int] = []  # and the one after its last

    def push(self, piece: bytes) -> str:
        shown = super().push(piece)
        text = self._characters.decode(piece)
        self._texts.append(text)
        self._starts.append(self._length)
        self._length += len(text)
        self._ends.append(self._length + (not self.is_whole))
        return shown

    def tokens_of(self, thoughts: Iterable[str]) -> int:
        """Tokens with text of `thoughts`, which are parts of the answer, in its order. A token that is in a thought and
        beside it counts; the tags around it do not.

        A part that is not in the text as it is (its format escapes it, or the prompt has its beginning) has its share
        of the tokens, by its length.
        """
        text = "".join(self._texts) + self._characters.decode(b"", final=True)
        searched = counted = n_tokens = n_elsewhere = 0
        for part in thoughts:
            at = text.find(part, searched)
            if at < 0:
                n_elsewhere += len(part)
                continue
            searched = at + len(part)
            first = max(counted, bisect_right(self._ends, at))
            counted = max(first, bisect_left(self._starts, searched))
            n_tokens += counted - first
        if n_elsewhere:
            n_tokens += round(len(self._ends) * n_elsewhere / max(n_elsewhere, len(text)))
        return min(n_tokens, len(self._ends))
