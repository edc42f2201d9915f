"""An answer in the format of Anthropic's API: blocks of thoughts, text and tool calls, whole or as named events."""

from __future__ import annotations

import json
from typing import Any

from actors.serving.message import Message
from actors.serving.named_event import named_event
from actors.serving.protocol import Chunk, Delta, ReplyForm, deltas_of

_STOPS = {"stop": "end_turn", "length": "max_tokens"}


class AnthropicReply:
    """Turns the chunks of one answer, in order, into what the client reads."""

    def __init__(self, wanted: ReplyForm) -> None:
        self._wanted = wanted
        self._said = Message()
        self._blocks = 0  # begun
        self._open: tuple[str, int | None] | None = None  # the kind of the last one, and the number of its call
        self._begun = False

    def bytes_of(self, chunk: Chunk) -> bytes:
        """What the client reads for `chunk`; empty for all but the last one of an answer that is sent whole."""
        last = chunk.finish_reason is not None
        if not self._wanted.stream:
            for delta in deltas_of(chunk):
                self._said.add(delta)
            return json.dumps(self._whole(chunk)).encode() if last else b""
        events: list[bytes] = []
        if not self._begun:
            self._begun = True
            usage = {"input_tokens": 0, "output_tokens": 0}  # known only at the end
            events.append(named_event("message_start", message=self._envelope([], None, None, usage)))
        for delta in deltas_of(chunk):
            events += self._events_of(delta)
        if last:
            events += self._close()
            reason = {"stop_reason": self._stop_reason(chunk), "stop_sequence": chunk.stopped_by or None}
            events += [named_event("message_delta", delta=reason, usage=_usage(chunk)), named_event("message_stop")]
        return b"".join(events)

    def _events_of(self, delta: Delta) -> list[bytes]:
        self._said.add(delta)
        events: list[bytes] = []
        if delta.reasoning:
            events += self._switch("thinking", None, {"type": "thinking", "thinking": "", "signature": ""})
            events.append(self._piece({"type": "thinking_delta", "thinking": delta.reasoning}))
        if delta.content:
            events += self._switch("text", None, {"type": "text", "text": ""})
            events.append(self._piece({"type": "text_delta", "text": delta.content}))
        if delta.tool is not None and delta.arguments:  # its name is complete only then
            call = self._said.calls[delta.tool]
            block = {"type": "tool_use", "id": _id_of(call.call_id), "name": call.name, "input": {}}
            call.told = True
            events += self._switch("tool_use", delta.tool, block)
            events.append(self._piece({"type": "input_json_delta", "partial_json": delta.arguments}))
        return events

    def _switch(self, kind: str, number: int | None, block: dict[str, Any]) -> list[bytes]:
        """Continue the open block if it is this one, else close it and begin `block`."""
        if self._open == (kind, number):
            return []
        events = self._close()
        self._open = (kind, number)
        self._blocks += 1
        return [*events, named_event("content_block_start", index=self._blocks - 1, content_block=block)]

    def _close(self) -> list[bytes]:
        """Ends the open block. Calls without arguments are sent now, as a whole."""
        events = [self._end_of_block()] if self._open is not None else []
        self._open = None
        for call in self._said.calls.values():
            if not call.told:
                call.told = True
                self._blocks += 1
                block = {"type": "tool_use", "id": _id_of(call.call_id), "name": call.name, "input": {}}
                events.append(named_event("content_block_start", index=self._blocks - 1, content_block=block))
                events.append(self._end_of_block())
        return events

    def _end_of_block(self) -> bytes:
        return named_event("content_block_stop", index=self._blocks - 1)

    def _piece(self, delta: dict[str, Any]) -> bytes:
        return named_event("content_block_delta", index=self._blocks - 1, delta=delta)

    def _whole(self, last: Chunk) -> dict[str, Any]:
        said = self._said
        content: list[dict[str, Any]] = []
        if said.thoughts:
            content.append({"type": "thinking", "thinking": said.thoughts, "signature": ""})
        if said.content:
            content.append({"type": "text", "text": said.content})
        content += [
            {"type": "tool_use", "id": _id_of(call.call_id), "name": call.name, "input": call.as_object()}
            for call in said.calls.values()
        ]
        return self._envelope(content, self._stop_reason(last), last.stopped_by or None, _usage(last))

    def _envelope(
        self,
        content: list[dict[str, Any]],
        stop_reason: str | None,
        stop_sequence: str | None,
        usage: dict[str, int],
    ) -> dict[str, Any]:
        return {
            "id": self._wanted.request_id,
            "type": "message",
            "role": "assistant",
            "model": self._wanted.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": stop_sequence,
            "usage": usage,
        }

    def _stop_reason(self, last: Chunk) -> str:
        if last.stopped_by:
            return "stop_sequence"
        return "tool_use" if self._said.calls and last.finish_reason == "stop" else _STOPS[last.finish_reason or "stop"]


def _id_of(call_id: str) -> str:
    return call_id.replace("call_", "toolu_", 1)


def _usage(last: Chunk) -> dict[str, int]:
    return {
        "input_tokens": last.prompt_tokens - last.cached_tokens,
        "cache_read_input_tokens": last.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": last.completion_tokens,
    }
