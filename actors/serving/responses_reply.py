"""An answer as OpenAI's `response`: items of thoughts, text and tool calls, whole or in numbered events.

One item is told after the other: the next one begins when the last one has ended. Thoughts are told as they are
(`reasoning_text`). Nobody sums them up, so `summary` is empty.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from actors.serving.message import Call
from actors.serving.named_event import named_event
from actors.serving.protocol import Chunk, Delta, ReplyForm, deltas_of
from actors.serving.telling import likelihood_of

Kind = Literal["reasoning", "message", "function_call"]
Status = Literal["in_progress", "completed", "incomplete", "failed"]

_IDS: Mapping[Kind, str] = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
_EVENTS: Mapping[Kind, str] = {
    "reasoning": "response.reasoning_text",
    "message": "response.output_text",
    "function_call": "response.function_call_arguments",
}

_CODES = {
    "invalid_request_error": "invalid_prompt",
    "rate_limit_error": "rate_limit_exceeded",
    "server_error": "server_error",
}
"""Of errors inside a response, by their type: OpenAI knows no others."""


@dataclass(slots=True)
class _Item:
    """An item of the output. `index`: its place there. `call`: what a `function_call` calls. `number`: of that call.

    `pieces`: of its text (for a call: of its arguments) so far. `logprobs`: of the tokens of a message, if they were
    asked for. `told`: whether its client knows of it.
    """

    kind: Kind
    index: int
    number: int | None
    item_id: str
    call: Call = field(default_factory=Call)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    told: bool = False
    status: Status = "in_progress"

    def part(self) -> dict[str, Any]:
        """Its text, as a part of its content."""
        text = "".join(self.pieces)
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs}

    def as_object(self) -> dict[str, Any]:
        """The item as its client reads it. It has no content before it has ended: parts are told apart."""
        head = {"id": self.item_id, "type": self.kind, "status": self.status}
        if self.kind == "function_call":
            return {**head, "call_id": self.call.call_id, "name": self.call.name, "arguments": "".join(self.pieces)}
        content = [] if self.status == "in_progress" else [self.part()]
        if self.kind == "reasoning":
            return {**head, "summary": [], "content": content}
        return {**head, "role": "assistant", "content": content}


class ResponsesReply:
    """Turns the chunks of one answer, in order, into what the client reads."""

    def __init__(self, wanted: ReplyForm) -> None:
        self._wanted = wanted
        self._items: list[_Item] = []
        self._open: _Item | None = None  # the last one, until it has ended
        self._logprobs: list[dict[str, Any]] = []  # that are not told yet
        self._events: list[bytes] = []  # that are not sent yet
        self._numbered = 0  # events so far

    def bytes_of(self, chunk: Chunk) -> bytes:
        """What the client reads for `chunk`; empty for all but the last one of an answer that is sent whole."""
        if self._wanted.stream and not self._numbered:
            for kind in ("response.created", "response.in_progress"):
                self._say(kind, response=_response(self._wanted, "in_progress", []))
        self._logprobs += map(likelihood_of, chunk.likelihoods)
        for delta in deltas_of(chunk):
            self._add(delta)
        if chunk.finish_reason is not None:
            status: Status = "incomplete" if chunk.finish_reason == "length" else "completed"
            self._take_logprobs(self._open or self._item("message"))  # clients look for one, even if nothing was said
            self._close(status)
            response = _response(self._wanted, status, [item.as_object() for item in self._items], _usage(chunk))
            if not self._wanted.stream:
                return json.dumps(response).encode()
            self._say(f"response.{status}", response=response)
        said, self._events = b"".join(self._events), []
        return said

    def _add(self, delta: Delta) -> None:
        if delta.reasoning:
            self._more(self._item("reasoning"), delta.reasoning)
        if delta.content:
            self._more(self._item("message"), delta.content)
        if delta.tool is not None:
            item = self._item("function_call", delta.tool)
            item.call.name = delta.name or item.call.name
            if delta.arguments:  # until then its name may grow
                self._more(item, delta.arguments)

    def _item(self, kind: Kind, number: int | None = None) -> _Item:
        """The open item where it is that one; else a new one, and the open one ends."""
        if self._open is None or (self._open.kind, self._open.number) != (kind, number):
            self._close("completed")
            self._open = _Item(kind, len(self._items), number, f"{_IDS[kind]}_{secrets.token_hex(12)}")
            self._items.append(self._open)
        return self._open

    def _more(self, item: _Item, piece: str) -> None:
        self._begin(item)
        item.pieces.append(piece)
        self._say_of(item, ".delta", self._take_logprobs(item), delta=piece)

    def _take_logprobs(self, item: _Item) -> list[dict[str, Any]]:
        """Those that were not told yet, where they belong to a message. Others are never told."""
        taken, self._logprobs = self._logprobs, []
        if item.kind != "message":
            return []
        item.logprobs += taken
        return taken

    def _begin(self, item: _Item) -> None:
        """Tells of the item, unless its client knows of it."""
        if item.told:
            return
        item.told = True
        self._say("response.output_item.added", output_index=item.index, item=item.as_object())
        if item.kind != "function_call":
            self._say("response.content_part.added", **_place(item), part=item.part())

    def _close(self, status: Status) -> None:
        """Ends the open item."""
        item, self._open = self._open, None
        if item is None:
            return
        if item.kind == "function_call" and not item.pieces and status == "completed":
            self._more(item, "{}")  # clients read arguments as JSON, also where there are none
        self._begin(item)
        item.status = status
        if item.kind == "function_call":
            self._say_of(item, ".done", [], name=item.call.name, arguments="".join(item.pieces))
        else:
            part = item.part()
            self._say_of(item, ".done", item.logprobs, text=part["text"])
            self._say("response.content_part.done", **_place(item), part=part)
        self._say("response.output_item.done", output_index=item.index, item=item.as_object())

    def _say_of(self, item: _Item, what: str, logprobs: list[dict[str, Any]], **told: Any) -> None:
        """An event of the item's text: ".delta" or ".done"."""
        if item.kind == "message":
            told["logprobs"] = logprobs
        self._say(_EVENTS[item.kind] + what, **_place(item), **told)

    def _say(self, kind: str, **told: Any) -> None:
        if self._wanted.stream:
            self._events.append(named_event(kind, sequence_number=self._numbered, **told))
            self._numbered += 1


def failure_events(wanted: ReplyForm, error: Mapping[str, Any], number: int) -> bytes:
    """The end of a stream that failed after `number` events. `error`: as OpenAI's API tells one.

    OpenAI's clients raise what stands in `error`; others read the fields beside it, or the `response`.
    """
    flat = {name: error[name] for name in ("code", "message", "param")}
    told = {"code": _CODES[error["type"]], "message": error["message"]}
    response = _response(wanted, "failed", [], error=told)
    return named_event("error", sequence_number=number, **flat, error=error) + named_event(
        "response.failed", sequence_number=number + 1, response=response
    )


def _place(item: _Item) -> dict[str, Any]:
    """Where a piece of the item belongs."""
    place: dict[str, Any] = {"item_id": item.item_id, "output_index": item.index}
    return place if item.kind == "function_call" else {**place, "content_index": 0}


def _response(
    wanted: ReplyForm,
    status: Status,
    output: Sequence[Mapping[str, Any]],
    usage: Mapping[str, Any] | None = None,
    error: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    return {
        "id": wanted.request_id,
        "object": "response",
        "created_at": wanted.created,
        # The gateway's clock and this one may differ.
        "completed_at": max(wanted.created, int(time.time())) if status == "completed" else None,
        "status": status,
        "error": error,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "model": wanted.model,
        "output": output,
        "usage": usage,
        **json.loads(wanted.settings),
    }


def _usage(last: Chunk) -> dict[str, Any]:
    """Tokens of thoughts are among the others, too."""
    return {
        "input_tokens": last.prompt_tokens,
        "input_tokens_details": {"cached_tokens": last.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": last.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": last.reasoning_tokens},
        "total_tokens": last.prompt_tokens + last.completion_tokens,
    }
