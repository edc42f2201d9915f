"""An answer in the format of Ollama's API: lines of JSON, or one object. Durations are nanoseconds.

Time in the queue and for a load counts as `load_duration`.
"""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone
from typing import Any

from actors.serving.message import Message
from actors.serving.protocol import Chunk, Delta, ReplyForm, deltas_of


class OllamaReply:
    """Turns the chunks of one answer, in order, into what the client reads."""

    def __init__(self, wanted: ReplyForm) -> None:
        self._wanted = wanted
        self._chat = wanted.form == "ollama-chat"
        self._said = Message()
        self._told_calls = 0

    def bytes_of(self, chunk: Chunk) -> bytes:
        """What the client reads for `chunk`; empty for all but the last one of an answer that is sent whole."""
        last = chunk.finish_reason is not None
        parts = [part for delta in deltas_of(chunk) for part in self._take(delta)]
        if last:
            parts += self._calls(len(self._said.calls))
        if not self._wanted.stream:
            return self._line(self._whole(), chunk) if last else b""
        lines = [self._line(part) for part in parts]
        return b"".join([*lines, self._line({}, chunk)] if last else lines)

    def _take(self, delta: Delta) -> list[dict[str, Any]]:
        """What can be sent now: a tool call only when it is complete."""
        self._said.add(delta)
        parts: list[dict[str, Any]] = []
        if delta.reasoning:
            parts.append({"thinking": delta.reasoning})
        if delta.content:
            parts += [*self._calls(len(self._said.calls)), {"content": delta.content}]
        if delta.tool is not None:
            parts += self._calls(len(self._said.calls) - 1)
        return parts

    def _calls(self, count: int) -> list[dict[str, Any]]:
        """Those of the first `count` calls that were not sent yet."""
        calls = list(self._said.calls.values())[self._told_calls : count]
        self._told_calls = max(self._told_calls, count)
        return [{"tool_calls": [{"function": {"name": call.name, "arguments": call.as_object()}}]} for call in calls]

    def _whole(self) -> dict[str, Any]:
        whole: dict[str, Any] = {"content": self._said.content}
        if self._said.thoughts:
            whole["thinking"] = self._said.thoughts
        if self._said.calls:
            self._told_calls = 0
            whole["tool_calls"] = [call for part in self._calls(len(self._said.calls)) for call in part["tool_calls"]]
        return whole

    def _line(self, part: dict[str, Any], last: Chunk | None = None) -> bytes:
        now = datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
        said = {"content": "", **part}
        told: dict[str, Any] = {"model": self._wanted.model, "created_at": now}
        if self._chat:
            told["message"] = {"role": "assistant", **said}
        else:
            told |= {"response": said.pop("content"), **said}
        told["done"] = last is not None
        if last is not None:
            told |= self._end(last)
        return json.dumps(told).encode() + (b"\n" if self._wanted.stream else b"")

    def _end(self, last: Chunk) -> dict[str, Any]:
        total_s = time.time() - self._wanted.created
        prompt_s, answer_s = last.timings[:2] if last.timings else (0.0, 0.0)
        seconds = {
            "total_duration": total_s,
            "load_duration": total_s - prompt_s - answer_s,
            "prompt_eval_duration": prompt_s,
            "eval_duration": answer_s,
        }
        return {
            "done_reason": last.finish_reason,
            **{name: max(0, round(1e9 * value)) for name, value in seconds.items()},
            "prompt_eval_count": last.prompt_tokens,
            "eval_count": last.completion_tokens,
        }
