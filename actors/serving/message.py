"""An assistant's message so far: content, thoughts, and tool calls."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

from actors.serving.protocol import Delta


@dataclass(slots=True)
class Call:
    """A tool call. `arguments`: the text of its JSON so far. `told`: whether it was sent to the client."""

    call_id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")
    name: str = ""
    arguments: str = ""
    told: bool = False

    def as_object(self) -> dict[str, Any]:
        """The arguments as an object, which is empty if they are cut off."""
        try:
            told = json.loads(self.arguments)
        except (ValueError, RecursionError):  # cut off, or nested too deeply
            return {}
        return told if isinstance(told, dict) else {}


class Message:
    """`calls`: by number."""

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}
        self._contents: list[str] = []
        self._thoughts: list[str] = []

    @property
    def content(self) -> str:
        return "".join(self._contents)

    @property
    def thoughts(self) -> str:
        return "".join(self._thoughts)

    def add(self, delta: Delta) -> None:
        if delta.reasoning:
            self._thoughts.append(delta.reasoning)
        if delta.content:
            self._contents.append(delta.content)
        if delta.tool is not None:
            call = self.calls.setdefault(delta.tool, Call())
            call.name = delta.name or call.name
            call.arguments += delta.arguments
