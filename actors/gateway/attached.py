"""Pictures and sounds in requests: every dialect's way to send them becomes the same part of a message.

A file comes in the body, as base64, or as the address of a picture, which is fetched before anything else happens
(`fetching`). What the base64 holds is looked at where nobody else is harmed, in the preparer.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

from actors.gateway.bodies import TOLD_LENGTH
from actors.gateway.errors import clipped
from actors.gateway.limits import MAX_ADDRESS_LENGTH
from actors.serving.attachments import MOST_FILES
from actors.serving.protocol import content_of
from scheduler.errors import Rejected

SEND_IT = "send the file itself: data:image/png;base64,…"

_DATA_URL = re.compile(r"data:[^,;]{0,100}(;[^,;]{0,100}){0,4};base64,", re.IGNORECASE)


class Fetch(NamedTuple):
    """A file that must be fetched: its base64 belongs into the content of its request, after `at` bytes. `param`: the
    field that has its address."""

    param: str
    url: str
    at: int


def content_to_fetch(**parts: Any) -> tuple[bytes, tuple[Fetch, ...]]:
    """As `content_of`, and what must be fetched for it. Raises Rejected for too many files."""
    wanted = [*_to_fetch(parts)]
    if not wanted:
        return content_of(**parts), ()
    if len(wanted) > MOST_FILES:
        raise Rejected(f"the messages have more than {MOST_FILES} files; send fewer")
    marker = secrets.token_hex(16)  # no client can write it
    params = [part.pop("param") for part in wanted]
    for part in wanted:
        part["data"] = marker
    pieces = content_of(**parts).split(marker.encode())
    for part in wanted:
        part["data"] = ""
    places = accumulate(map(len, pieces[:-1]))
    fetches = (Fetch(*each) for each in zip(params, (part["url"] for part in wanted), places, strict=True))
    return b"".join(pieces), tuple(fetches)


def _to_fetch(parts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The parts of messages that `picture_at` made of addresses."""
    for message in parts.get("messages") or ():
        if isinstance(message.get("content"), list):
            yield from (part for part in message["content"] if "param" in part)


def picture_at(param: str, url: object) -> dict[str, Any]:
    """Of a data URL, or of an address that is fetched later (`content_to_fetch`). Raises Rejected for any other."""
    if not isinstance(url, str):
        raise _wrong(param, 'it needs a URL: "data:image/png;base64,…"')
    if url[:8].lower().startswith(("http://", "https://")):
        if len(url) > MAX_ADDRESS_LENGTH:
            raise _wrong(param, f"a URL of {len(url)} characters; at most {MAX_ADDRESS_LENGTH} are allowed; {SEND_IT}")
        return {"type": "image", "param": param, "url": url, "data": ""}
    if url[:5].lower() != "data:":
        raise _wrong(param, f"{clipped(url, TOLD_LENGTH)!r} is not the URL of a picture; {SEND_IT}")
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
    given: Mapping[str, Any] = source if isinstance(source, Mapping) else {}
    match given.get("type"):
        case "base64":
            return picture(param, given.get("data"))
        case "url":
            return picture_at(param, given.get("url"))
        case _:
            raise _wrong(
                param, 'an image is {"type": "base64", "media_type": …, "data": …} or {"type": "url", "url": …}'
            )


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
