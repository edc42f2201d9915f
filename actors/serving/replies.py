"""An answer in the format of OpenAI's API, made where it is computed. The gateway passes its bytes on unchanged.

Cost of an event: one JSON string; what stands around it is the same for all events of an answer that is only text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Protocol

from actors.serving.anthropic_reply import AnthropicReply
from actors.serving.message import Message
from actors.serving.ollama_reply import OllamaReply
from actors.serving.protocol import Chunk, Delta, ReplyForm, deltas_of

DONE = b"data: [DONE]\n\n"
_MARK = "text"  # of an event, where its own text will stand


class AnyReply(Protocol):
    """Turns the chunks of one answer, in order, into what the client reads."""

    def bytes_of(self, chunk: Chunk) -> bytes: ...


def reply_in(wanted: ReplyForm) -> AnyReply:
    """What makes an answer that reads as it is wanted."""
    match wanted.form:
        case "anthropic":
            return AnthropicReply(wanted)
        case "ollama-chat" | "ollama-generate":
            return OllamaReply(wanted)
        case _:
            return Reply(wanted)


class Reply:
    """Turns the chunks of one answer, in order, into what the client reads."""

    def __init__(self, wanted: ReplyForm) -> None:
        self._wanted = wanted
        self._chat = wanted.form == "chat"
        kind = ("chat.completion.chunk" if wanted.stream else "chat.completion") if self._chat else "text_completion"
        self._head = {"id": wanted.request_id, "object": kind, "created": wanted.created, "model": wanted.model}
        # OpenAI's clients expect `usage` in every event once they have asked for it: null until the end.
        self._tail: dict[str, Any] = {"usage": None} if wanted.include_usage else {}
        self._said = _Telling(wanted.as_functions)
        self._begun = True
        self._before, _, self._after = self._event(_choice(self._delta(_MARK))).rpartition(_MARK.encode())
        self._begun = False

    def bytes_of(self, chunk: Chunk) -> bytes:
        """What the client reads for `chunk`; empty for all but the last one of an answer that is sent whole."""
        if not self._wanted.stream:
            for _ in self._said.take(deltas_of(chunk)):
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
        deltas = [*self._said.take(deltas_of(chunk))]
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
        said = {"message": self._said.whole()} if self._chat else {"text": self._said.message.content}
        choice = _choice(said, self._said.finish_reason(last))
        return json.dumps({**self._head, "choices": [choice], "usage": _usage(last)}).encode()


class _Telling:
    """What was said, and how it is told. `as_functions`: in the words of OpenAI's API before there were tools."""

    def __init__(self, as_functions: bool) -> None:
        self._as_functions = as_functions
        self.message = Message()

    def take(self, deltas: tuple[Delta, ...]) -> Iterator[dict[str, Any]]:
        """Adds them; yields each as the client reads it. A call is told with the first of its arguments: until then its
        name may grow."""
        for delta in deltas:
            if delta.content or (delta.tool is not None and delta.tool not in self.message.calls):
                yield from self.left()
            self.message.add(delta)
            if delta.reasoning:
                yield {"reasoning_content": delta.reasoning}
            if delta.content:
                yield {"content": delta.content}
            if delta.tool is not None and delta.arguments:
                yield self._told(delta.tool, delta.arguments)

    def left(self) -> Iterator[dict[str, Any]]:
        """Calls that have no arguments."""
        for number, call in self.message.calls.items():
            if not call.told:
                yield self._told(number, "")

    def _told(self, number: int, arguments: str) -> dict[str, Any]:
        call = self.message.calls[number]
        function = {"arguments": arguments} if call.told else {"name": call.name, "arguments": arguments}
        head = {"index": number} if call.told else {"index": number, "id": call.call_id, "type": "function"}
        call.told = True
        return {"function_call": function} if self._as_functions else {"tool_calls": [{**head, "function": function}]}

    def whole(self) -> dict[str, Any]:
        said = self.message
        message: dict[str, Any] = {"role": "assistant", "content": said.content}
        if said.thoughts:
            message["reasoning_content"] = said.thoughts
        if said.calls:
            message["content"] = said.content or None
            calls = [(call.call_id, {"name": call.name, "arguments": call.arguments}) for call in said.calls.values()]
            if self._as_functions:
                message["function_call"] = calls[0][1]
            else:
                message["tool_calls"] = [
                    {"id": call_id, "type": "function", "function": function} for call_id, function in calls
                ]
        return message

    def finish_reason(self, last: Chunk) -> str | None:
        if self.message.calls and last.finish_reason == "stop":
            return "function_call" if self._as_functions else "tool_calls"
        return last.finish_reason


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
