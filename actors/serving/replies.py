"""An answer in the format of OpenAI's API, made where it is computed. The gateway passes its bytes on unchanged.

Cost of an event: one JSON string; what stands around it is the same for all events of an answer that is only text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Any, Protocol

from actors.serving.anthropic_reply import AnthropicReply
from actors.serving.completion_reply import CompletionReply
from actors.serving.message import Message
from actors.serving.ollama_reply import OllamaReply
from actors.serving.protocol import Chunk, Delta, Likelihood, ReplyForm, deltas_of
from actors.serving.responses_reply import ResponsesReply
from actors.serving.telling import in_json, likelihood_of, timings_of

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
        case "completion":
            return CompletionReply(wanted)
        case "plain":
            return PlainReply()
        case "responses":
            return ResponsesReply(wanted)
        case _:
            return Reply(wanted)


class PlainReply:
    """The text as it is."""

    def bytes_of(self, chunk: Chunk) -> bytes:
        return chunk.text.encode()


class Reply:
    """Turns the chunks of the answers to one request, in order, into what the client reads."""

    def __init__(self, wanted: ReplyForm) -> None:
        self._wanted = wanted
        self._chat = wanted.form == "chat"
        kind = ("chat.completion.chunk" if wanted.stream else "chat.completion") if self._chat else "text_completion"
        self._head = {"id": wanted.request_id, "object": kind, "created": wanted.created, "model": wanted.model}
        # OpenAI's clients expect `usage` in every event once they have asked for it: null until the end.
        self._tail: dict[str, Any] = {"usage": None} if wanted.include_usage else {}
        self._choices: dict[int, _Choice] = {}

    def bytes_of(self, chunk: Chunk) -> bytes:
        """What the client reads for `chunk`; empty for all but the last one of an answer that is sent whole."""
        choice = self._choices.get(chunk.index)
        if choice is None:
            choice = self._choices[chunk.index] = self._choice(chunk.index)
        if not self._wanted.stream:
            choice.take(chunk)
            return self._whole(chunk) if chunk.finish_reason is not None and not chunk.left else b""
        if chunk.deltas is None and chunk.finish_reason is None and choice.begun and not chunk.likelihoods:
            return choice.before + json.dumps(chunk.text)[1:-1].encode() + choice.after
        events = list(choice.events(chunk))
        if chunk.finish_reason is None or chunk.left:
            return b"".join(map(self._event, events))
        if self._wanted.include_usage:
            usage = _event({**self._head, "choices": [], "usage": _usage(chunk), **timings_of(chunk)})
            return b"".join([*map(self._event, events), usage, DONE])
        return b"".join([*map(self._event, events[:-1]), self._event(events[-1], timings_of(chunk)), DONE])

    def _choice(self, index: int) -> _Choice:
        choice = _Choice(index, self._chat, self._wanted.as_functions)
        choice.before, _, choice.after = self._event(choice.text_event(_MARK)).rpartition(_MARK.encode())
        return choice

    def _event(self, choice: dict[str, Any], more: Mapping[str, Any] = MappingProxyType({})) -> bytes:
        return _event({**self._head, "choices": [choice], **self._tail, **more})

    def _whole(self, last: Chunk) -> bytes:
        choices = ", ".join(self._choices[index].whole() for index in sorted(self._choices))
        around = json.dumps({**self._head, "usage": _usage(last), **timings_of(last)})
        return f'{around[:-1]}, "choices": [{choices}]}}'.encode()


class _Choice:
    """One of the answers. `before` and `after`: what stands around the text of its events. `begun`: the client has
    heard of it."""

    def __init__(self, index: int, chat: bool, as_functions: bool) -> None:
        self._index = index
        self._chat = chat
        self._said = _Telling(as_functions)
        self._columns: dict[str, list[str]] = {}  # likelihoods of an answer that is sent whole, as JSON
        self._offset = 0  # of the next token with a likelihood, in characters
        self._finish_reason: str | None = None
        self.begun = False
        self.before = self.after = b""

    def take(self, chunk: Chunk) -> None:
        """Of an answer that is sent whole."""
        for _ in self._said.take(deltas_of(chunk)):
            pass
        if chunk.likelihoods:
            for name, column in self._likelihoods(chunk.likelihoods).items():
                self._columns.setdefault(name, []).extend(in_json(column))
        if chunk.finish_reason is not None:
            self._finish_reason = self._said.finish_reason(chunk)

    def whole(self) -> str:
        """As JSON."""
        said = {"message": self._said.whole()} if self._chat else {"text": self._said.message.content}
        told = json.dumps({"index": self._index, "finish_reason": self._finish_reason, **said})
        columns = [f'"{name}": [{", ".join(column)}]' for name, column in self._columns.items()]
        if columns and self._chat:
            columns.append('"refusal": null')
        logprobs = f"{{{', '.join(columns)}}}" if columns else "null"
        return f'{told[:-1]}, "logprobs": {logprobs}}}'

    def events(self, chunk: Chunk) -> Iterator[dict[str, Any]]:
        """What the client reads for `chunk` in a stream: events of this choice."""
        likelihoods = chunk.likelihoods
        if chunk.deltas is None:
            told = self._told(self._text(chunk.text), chunk.finish_reason, likelihoods)
            self.begun = True
            yield told
            return
        deltas = [*self._said.take(chunk.deltas)]
        if chunk.finish_reason is not None:
            deltas += self._said.left()
        for delta in deltas:
            first = {} if self.begun else {"role": "assistant", "content": None}
            yield self._told({"delta": first | delta}, None, likelihoods)
            self.begun, likelihoods = True, ()
        if chunk.finish_reason is not None:
            first = {} if self.begun else {"role": "assistant", "content": ""}
            yield self._told({"delta": first}, self._said.finish_reason(chunk), likelihoods)
        elif likelihoods:
            yield self._told({"delta": {}}, None, likelihoods)

    def text_event(self, text: str) -> dict[str, Any]:
        """An event in the middle of an answer that is only text."""
        return self._told({"delta": {"content": text}} if self._chat else {"text": text})

    def _text(self, text: str) -> dict[str, Any]:
        if not self._chat:
            return {"text": text}
        if not self.begun:
            return {"delta": {"role": "assistant", "content": text}}
        return {"delta": {"content": text} if text else {}}

    def _told(
        self, said: dict[str, Any], finish_reason: str | None = None, likelihoods: Sequence[Likelihood] = ()
    ) -> dict[str, Any]:
        logprobs = self._likelihoods(likelihoods) if likelihoods else None
        if logprobs and self._chat:
            logprobs["refusal"] = None
        return {"index": self._index, "logprobs": logprobs, "finish_reason": finish_reason, **said}

    def _likelihoods(self, likelihoods: Sequence[Likelihood]) -> dict[str, Any]:
        """Lists of as many members as there are tokens."""
        if self._chat:
            return {"content": [likelihood_of(each) for each in likelihoods]}
        told, self._offset = _tokens(likelihoods, self._offset)
        return told


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


def _tokens(likelihoods: Sequence[Likelihood], offset: int) -> tuple[dict[str, Any], int]:
    """As completions tell it; `offset`: characters before the first. The chosen token is always among the likeliest."""
    texts = [each.piece.decode(errors="replace") for each in likelihoods]
    top = [
        {piece.decode(errors="replace"): logprob for _, piece, logprob in (*each.top, each[:3])}
        if each.top and each.logprob is not None
        else None
        for each in likelihoods
    ]
    offsets = list(accumulate(map(len, texts), initial=offset))
    told = {
        "tokens": texts,
        "token_logprobs": [each.logprob for each in likelihoods],
        "top_logprobs": top,
        "text_offset": offsets[:-1],
    }
    return told, offsets[-1]


def _usage(last: Chunk) -> dict[str, Any]:
    return {
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "total_tokens": last.prompt_tokens + last.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": last.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": last.reasoning_tokens},
    }
