"""An answer in the words of llama-server's own `/completion` and `/infill`, whole or streamed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from actors.serving.protocol import Chunk, ReplyForm
from actors.serving.telling import in_json, likelihood_of, timings_of

_STOPS = {"stop": "eos", "length": "limit"}


class CompletionReply:
    """Turns the chunks of one answer, in order, into what the client reads."""

    def __init__(self, wanted: ReplyForm) -> None:
        self._wanted = wanted
        self._texts: list[str] = []
        self._likelihoods: list[str] = []  # as JSON

    def bytes_of(self, chunk: Chunk) -> bytes:
        """What the client reads for `chunk`; empty for all but the last one of an answer that is sent whole."""
        if self._wanted.stream:
            return b"data: %s\n\n" % self._told(chunk, chunk.text, in_json(map(likelihood_of, chunk.likelihoods)))
        self._texts.append(chunk.text)
        self._likelihoods += in_json(map(likelihood_of, chunk.likelihoods))
        if chunk.finish_reason is None:
            return b""
        return self._told(chunk, "".join(self._texts), self._likelihoods)

    def _told(self, chunk: Chunk, text: str, likelihoods: Iterable[str]) -> bytes:
        told: dict[str, Any] = {"index": 0, "content": text, "stop": chunk.finish_reason is not None}
        if chunk.finish_reason is not None:
            told |= {
                "model": self._wanted.model,
                "tokens_predicted": chunk.completion_tokens,
                "tokens_evaluated": chunk.prompt_tokens,
                "tokens_cached": chunk.cached_tokens,
                "stop_type": "word" if chunk.stopped_by else _STOPS[chunk.finish_reason],
                "stopping_word": chunk.stopped_by,
                "truncated": False,
                **timings_of(chunk),
            }
        listed = ", ".join(likelihoods)
        more = f', "completion_probabilities": [{listed}]' if listed else ""
        return f"{json.dumps(told)[:-1]}{more}}}".encode()
