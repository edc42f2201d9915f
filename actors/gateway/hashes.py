"""Hashes of requests: of what a prompt begins with, and of all that decides an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from hashlib import blake2b
from typing import Any

from actors.gateway.lora_settings import Scales
from actors.serving.protocol import EmbedRequest, GenerateRequest

_DECIDES_NOTHING = {"lease_id", "source", "reply", "content"}
"""Fields of requests: who asks, and how the answer is named. The content is added as it is."""


def fingerprint_of(model: str, asked: GenerateRequest | EmbedRequest) -> str:
    """A hash of all that decides what a runner does for it: the same for a request that comes again."""
    given = {each.name: getattr(asked, each.name) for each in fields(asked) if each.name not in _DECIDES_NOTHING}
    if isinstance(asked, GenerateRequest):
        given["reply"] = asked.reply.form, asked.reply.stream, asked.reply.include_usage, asked.reply.as_functions
    digest = blake2b(repr((model, type(asked).__name__, given)).encode(), digest_size=16)
    digest.update(asked.content)
    return digest.hexdigest()


def prefix_of(beginning: object, lora: Scales | None = None) -> str:
    """A hash of what a prompt begins with. With other adapters it is another beginning."""
    return blake2b(json.dumps([beginning, lora] if lora else beginning).encode(), digest_size=12).hexdigest()


def opening_of(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """All up to the first message of the user, which stays while the chat goes on."""
    first = next((i for i, message in enumerate(messages) if message.get("role") == "user"), 0)
    return messages[: first + 1]
