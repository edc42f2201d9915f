"""An answer in the words of OpenAI's API, made once, where it is computed: the gateway passes it on byte by byte.

Cost of an event: one JSON string; what stands around it is the same for all events of an answer that is only text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from actors.serving.protocol import Chunk, Delta, ReplyForm

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
        self._said = _Message(wanted.as_functions)
        self._begun = True
        self._before, _, self._after = self._event(_choice(self._delta(_MARK))).rpartition(_MARK.encode())
        self._begun = False

    def bytes_of(self, chunk: Chunk) -> bytes:
        """What the client reads for `chunk`; empty for all but the last one of an answer that is sent whole."""
        if not self._wanted.stream:
            for _ in self._said.take(_deltas(chunk)):
                pass
            return self._whole(chunk) if chunk.finish_reason is not None else b""
        if chunk.deltas is not None:
            return self._parsed(chunk)
        if chunk.finish_reason is None and self._begun:
            return self._before + json.dumps(chunk.text)[1:-1].encode() + self._after
        event = self._event(_choice(self._delta(chunk.text), chunk.finish_reason))
        self._begun = True
        return event if chunk.finish_reason is None else event + self._end(chunk)

    def _parsed(self, chunk: Chunk) -> bytes:
        """The events of a chunk that was parsed."""
        deltas = [*self._said.take(_deltas(chunk))]
        if chunk.finish_reason is not None:
            deltas += self._said.left()
        events = []
        for delta in deltas:
            first = {} if self._begun else {"role": "assistant", "content": None}
            events.append(self._event(_choice({"delta": first | delta})))
            self._begun = True
        if chunk.finish_reason is not None:
            first = {} if self._begun else {"role": "assistant", "content": ""}
            events += [self._event(_choice({"delta": first}, self._said.finish_reason(chunk))), self._end(chunk)]
        return b"".join(events)

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
        said = {"message": self._said.whole()} if self._chat else {"text": self._said.content}
        choice = _choice(said, self._said.finish_reason(last))
        return json.dumps({**self._head, "choices": [choice], "usage": _usage(last)}).encode()


@dataclass(slots=True)
class _Call:
    """A tool call. Its name is told with the first of its arguments: until then it may grow."""

    call_id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")
    name: str = ""
    arguments: str = ""
    told: bool = False


class _Message:
    """The message as far as it was said. `as_functions`: in the words of OpenAI's API before there were tools."""

    def __init__(self, as_functions: bool) -> None:
        self._as_functions = as_functions
        self._contents: list[str] = []
        self._thoughts: list[str] = []
        self._calls: dict[int, _Call] = {}

    @property
    def content(self) -> str:
        return "".join(self._contents)

    def take(self, deltas: tuple[Delta, ...]) -> Iterator[dict[str, Any]]:
        """Adds them; yields each as the client reads it."""
        for delta in deltas:
            if delta.reasoning:
                self._thoughts.append(delta.reasoning)
                yield {"reasoning_content": delta.reasoning}
            if delta.content:
                self._contents.append(delta.content)
                yield from self.left()
                yield {"content": delta.content}
            if delta.tool is not None:
                yield from self._take_call(delta.tool, delta)

    def _take_call(self, number: int, delta: Delta) -> Iterator[dict[str, Any]]:
        if number not in self._calls:
            yield from self.left()
        call = self._calls.setdefault(number, _Call())
        call.name = delta.name or call.name
        call.arguments += delta.arguments
        if not delta.arguments:
            return
        yield self._told(number, call, delta.arguments)
        call.told = True

    def left(self) -> Iterator[dict[str, Any]]:
        """Calls that have no arguments."""
        for number, call in self._calls.items():
            if not call.told:
                yield self._told(number, call, "")
                call.told = True

    def _told(self, number: int, call: _Call, arguments: str) -> dict[str, Any]:
        function = {"arguments": arguments} if call.told else {"name": call.name, "arguments": arguments}
        if self._as_functions:
            return {"function_call": function}
        head = {"index": number} if call.told else {"index": number, "id": call.call_id, "type": "function"}
        return {"tool_calls": [{**head, "function": function}]}

    def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self._thoughts:
            message["reasoning_content"] = "".join(self._thoughts)
        if self._calls:
            message["content"] = self.content or None
            functions = [{"name": call.name, "arguments": call.arguments} for call in self._calls.values()]
            if self._as_functions:
                message["function_call"] = functions[0]
            else:
                ids = [call.call_id for call in self._calls.values()]
                message["tool_calls"] = [
                    {"id": call_id, "type": "function", "function": function}
                    for call_id, function in zip(ids, functions, strict=True)
                ]
        return message

    def finish_reason(self, last: Chunk) -> str | None:
        if self._calls and last.finish_reason == "stop":
            return "function_call" if self._as_functions else "tool_calls"
        return last.finish_reason


def _deltas(chunk: Chunk) -> tuple[Delta, ...]:
    return (Delta(content=chunk.text),) if chunk.deltas is None else chunk.deltas


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
