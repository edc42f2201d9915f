"""An answer in the words of OpenAI's API, made once, where it is computed: the gateway passes it on byte by byte.

Cost of an event: one JSON string; what stands around it is the same for all events of an answer.
"""

from __future__ import annotations

import json
from typing import Any

from actors.serving.protocol import Chunk, ReplyForm

DONE = b"data: [DONE]\n\n"
_MARK = "text"  # of an event, where its own text will stand


class Reply:
    """Turns the chunks of one answer, in order, into what the client reads."""

    def __init__(self, wanted: ReplyForm) -> None:
        self._wanted = wanted
        self._chat = wanted.form == "chat"
        kind = ("chat.completion.chunk" if wanted.stream else "chat.completion") if self._chat else "text_completion"
        self._head = {"id": wanted.request_id, "object": kind, "created": wanted.created, "model": wanted.model}
        # OpenAI's clients expect `usage` in every event once they have asked for it: null until the end.
        self._tail: dict[str, Any] = {"usage": None} if wanted.include_usage else {}
        self._texts: list[str] = []  # of an answer that is sent whole
        self._begun = True
        self._before, _, self._after = self._event(_choice(self._delta(_MARK))).rpartition(_MARK.encode())
        self._begun = False

    def bytes_of(self, chunk: Chunk) -> bytes:
        """What the client reads for `chunk`; empty for all but the last one of an answer that is sent whole."""
        if not self._wanted.stream:
            self._texts.append(chunk.text)
            return self._whole(chunk) if chunk.finish_reason is not None else b""
        if chunk.finish_reason is None and self._begun:
            return self._before + json.dumps(chunk.text)[1:-1].encode() + self._after
        event = self._event(_choice(self._delta(chunk.text), chunk.finish_reason))
        self._begun = True
        return event if chunk.finish_reason is None else event + self._end(chunk)

    def _delta(self, text: str) -> dict[str, Any]:
        if not self._chat:
            return {"text": text}
        if not self._begun:
            return {"delta": {"role": "assistant", "content": text}}
        return {"delta": {"content": text} if text else {}}

    def _event(self, choice: dict[str, Any]) -> bytes:
        return _event({**self._head, "choices": [choice], **self._tail})

    def _end(self, last: Chunk) -> bytes:
        usage = _event({**self._head, "choices": [], "usage": _usage(last)}) if self._wanted.include_usage else b""
        return usage + DONE

    def _whole(self, last: Chunk) -> bytes:
        text = "".join(self._texts)
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        answer = {**self._head, "choices": [_choice(said, last.finish_reason)], "usage": _usage(last)}
        return json.dumps(answer).encode()


def _event(told: dict[str, Any]) -> bytes:
    return b"data: %s\n\n" % json.dumps(told).encode()


def _choice(said: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "logprobs": None, "finish_reason": finish_reason, **said}


def _usage(last: Chunk) -> dict[str, Any]:
    return {
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "total_tokens": last.prompt_tokens + last.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": last.cached_tokens},
    }
