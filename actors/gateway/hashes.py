"""Hashes of requests: of what a prompt begins with, and of all that decides an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from actors.gateway.lora_settings import Scales
from actors.serving.protocol import EmbedRequest, GenerateRequest


def fingerprint_of(model: str, asked: GenerateRequest | EmbedRequest) -> str:
    """A hash of all that decides the answer: the same for a request that comes again."""
    settings = (asked.max_tokens, asked.stop, asked.sampling, asked.lora) if isinstance(asked, GenerateRequest) else ()
    digest = blake2b(repr((model, settings)).encode(), digest_size=16)
    digest.update(asked.content)
    return digest.hexdigest()


def prefix_of(beginning: object, lora: Scales | None = None) -> str:
    """A hash of what a prompt begins with. With other adapters it is another beginning."""
    return blake2b(json.dumps([beginning, lora] if lora else beginning).encode(), digest_size=12).hexdigest()


def opening_of(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """All up to the first message of the user, which stays while the chat goes on."""
    first = next((i for i, message in enumerate(messages) if message.get("role") == "user"), 0)
    return messages[: first + 1]
