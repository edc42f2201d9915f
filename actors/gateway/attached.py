"""Pictures and sounds in requests: every dialect's way to send them becomes the same part of a message.

A file comes in the body, as base64. Nothing is fetched: a gateway that fetches any URL opens its own network to
strangers. What the base64 holds is looked at where nobody else is harmed, in the preparer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from actors.gateway.bodies import TOLD_LENGTH
from actors.gateway.errors import clipped
from scheduler.errors import Rejected

_DATA_URL = re.compile(r"data:[^,;]{0,100}(;[^,;]{0,100}){0,4};base64,", re.IGNORECASE)


def picture_at(param: str, url: object) -> dict[str, Any]:
    """Of a data URL. Raises Rejected for any other."""
    if not isinstance(url, str):
        raise _wrong(param, 'it needs a URL: "data:image/png;base64,…"')
    if url[:5].lower() != "data:":
        raise _wrong(
            param, f"{clipped(url, TOLD_LENGTH)!r} is not fetched; send the file itself: data:image/png;base64,…"
        )
    head = _DATA_URL.match(url)
    if head is None:
        raise _wrong(param, "a data URL must have its file in base64: data:image/png;base64,…")
    return picture(param, url[head.end() :])


def picture(param: str, data: object) -> dict[str, Any]:
    """Of a file in base64."""
    return {"type": "image", "data": _text(param, data)}


def part_of(param: str, part: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of a part in OpenAI's words that is no text; None for any other."""
    given = part.get("image_url")
    match part.get("type"):
        case "image_url":
            return picture_at(param, given.get("url") if isinstance(given, Mapping) else given)
        case "input_audio":
            sound = part.get("input_audio")
            return {"type": "audio", "data": _text(param, sound.get("data") if isinstance(sound, Mapping) else None)}
        case _:
            return None


def input_image_of(param: str, part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of type "input_image", as responses have it, in the words of chats."""
    if part.get("file_id") is not None:
        raise _wrong(param, "no files are stored here; send the file itself as image_url: data:image/png;base64,…")
    return {"type": "image_url", "image_url": part.get("image_url")}


def block_of(param: str, block: Mapping[str, Any]) -> dict[str, Any]:
    """Of Anthropic's block of type "image"."""
    source = block.get("source")
    if not isinstance(source, Mapping) or source.get("type") != "base64":
        raise _wrong(param, 'an image is taken as {"type": "base64", "media_type": …, "data": …}; nothing is fetched')
    return picture(param, source.get("data"))


def joined(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """The content of a message: one text, where there is nothing else."""
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _text(param: str, data: object) -> str:
    if not isinstance(data, str) or not data:
        raise _wrong(param, "it needs its file in base64")
    return data


def _wrong(param: str, message: str) -> Rejected:
    return Rejected(f"{param}: {message}", param=param)
