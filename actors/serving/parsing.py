"""Parses an answer while it is generated: its text becomes content, thoughts and tool calls before it is sent.

For every piece, llama.cpp parses the whole text again, in a preparer's child. So this has a thread of its own: the
engine's thread never waits for it, and pieces that came meanwhile are parsed together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Literal

from actors.serving.conversation import Parsing
from actors.serving.counted_text import CountedText
from actors.serving.jobs import Hearer
from actors.serving.protocol import Chunk, Delta, Likelihood
from scheduler.errors import ArrieroError, EngineFailed

log = logging.getLogger(__name__)

End = tuple[Literal["end"], BaseException | None]


REST = 4
LONGEST_REST_S = 0.5
"""After a piece was parsed, others wait for so many times as long, and are then parsed together. So an answer takes a
fifth of a core: parsing 4,000 tokens of a list one by one took 15.8 s of a core. Short texts take a millisecond."""

MOST_HELD = 64
"""Likelihoods that wait for text that the client sees. Told all at once, those of 4,000 tokens took seconds."""


class ParsedAnswer:
    """A `Hearer` that tells `hearer` what the chunks mean. Its thread starts with the first of them.

    `give_up`: called when the text cannot be parsed any more, to end the generation.
    """

    def __init__(self, hearer: Hearer[Chunk], parsing: Parsing, text: CountedText) -> None:
        """`text`: what the answer's tokens are pushed into, to count those of thoughts."""
        self._hearer = hearer
        self._parsing = parsing
        self._text = text
        self._thoughts: list[list[str]] = []  # parts of the answer, each in pieces
        self._thinks = False
        self._heard: SimpleQueue[Chunk | End] = SimpleQueue()
        self._likelihoods: list[Likelihood] = []  # of text that has not been told
        self._begun = self._closed = False
        self.give_up: Callable[[], object] = lambda: None

    @property
    def stalled(self) -> bool:
        return self._hearer.stalled

    def say(self, result: Chunk) -> None:
        if not self._begun:
            self._begun = True
            Thread(target=self._run, name="parsing", daemon=True).start()
        self._heard.put(result)

    def flush(self) -> None:
        """The thread does, after each piece."""

    def end(self, error: BaseException | None) -> None:
        if self._begun:
            self._heard.put(("end", error))
        else:
            self.close()
            self._hearer.end(error)

    def close(self) -> None:
        if not self._begun and not self._closed:
            self._closed = True
            self._parsing.close()

    def _run(self) -> None:
        failure: ArrieroError | None = None
        rests_until_s = 0.0
        while True:
            chunks, end = self._take(rests_until_s)
            if chunks and failure is None:
                began_s = time.perf_counter()
                try:
                    self._tell(chunks)
                except Exception as error:  # of any kind: nobody else would tell the client
                    if not isinstance(error, ArrieroError):
                        log.exception("an answer could not be parsed or sent")
                        error = EngineFailed(f"the answer could not be parsed or sent: {type(error).__name__}: {error}")
                    failure = error
                    self.give_up()
                now_s = time.perf_counter()
                rests_until_s = now_s + min(LONGEST_REST_S, REST * (now_s - began_s))
            if end is not None:
                self._parsing.close()
                self._hearer.end(failure or end[1])
                return

    def _take(self, not_before_s: float) -> tuple[list[Chunk], End | None]:
        """All that was heard since, at least one thing: at once if it is the last, else not before that moment."""
        chunks: list[Chunk] = []
        while True:
            rest_s = not_before_s - time.perf_counter()
            if chunks and rest_s <= 0 and self._heard.empty():
                return chunks, None
            try:
                item = self._heard.get(timeout=rest_s if chunks and rest_s > 0 else None)
            except Empty:
                return chunks, None
            if isinstance(item, tuple):
                return chunks, item
            chunks.append(item)
            if item.finish_reason is not None:
                return chunks, None

    def _tell(self, chunks: list[Chunk]) -> None:
        text = "".join(chunk.text for chunk in chunks)
        self._likelihoods += (each for chunk in chunks for each in chunk.likelihoods)
        last = chunks[-1]
        deltas = self._parsing.feed(text, last=last.finish_reason)
        self._note_thoughts(deltas)
        if last.finish_reason is not None:
            last = replace(last, reasoning_tokens=self._text.tokens_of(map("".join, self._thoughts)))
        if deltas or last.finish_reason is not None or len(self._likelihoods) >= MOST_HELD:
            self._hearer.say(replace(last, text=text, deltas=deltas, likelihoods=tuple(self._likelihoods)))
            self._hearer.flush()
            self._likelihoods.clear()

    def _note_thoughts(self, deltas: tuple[Delta, ...]) -> None:
        for delta in deltas:
            if delta.reasoning:
                if not self._thinks:
                    self._thoughts.append([])
                self._thoughts[-1].append(delta.reasoning)
                self._thinks = True
            if delta.content or delta.tool is not None:
                self._thinks = False
