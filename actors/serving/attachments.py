"""What comes with the messages of a chat besides text: pictures and sounds.

A chat template knows only text. So each picture is a *marker* in the text while the template renders it, as in
llama-server. Markers hold a random number, so no client can write one. Belongs to a preparer's child.
"""

from __future__ import annotations

import binascii
import re
import secrets
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from actors.serving.dialogue import Senses
from scheduler.errors import Rejected
from scheduler.units import MIB, format_bytes

MOST_FILES = 100
"""Of one request; Anthropic's own bound. Each takes tokens of the slot, so most requests have room for fewer."""

MOST_FILE_BYTES = 20 * MIB
"""Of one file; OpenAI's own bound. A body of 32 MiB has room for one such file in base64."""

Part = Mapping[str, Any]


class Attachments:
    """Of one chat. `files`: of each its kind ("image" or "audio") and its bytes, in the order of the messages."""

    def __init__(self, senses: Senses) -> None:
        self.senses = senses
        self._name = f"<__media_{secrets.token_hex(16)}_"
        self.files: list[tuple[str, bytes]] = []

    def taken_from(self, messages: Sequence[Part]) -> Sequence[Part]:
        """The messages with markers instead. Raises Rejected for what this model does not take, or too much of it."""
        if not any(isinstance(message.get("content"), list) for message in messages):
            return messages
        return [
            {**message, "content": [self._marked(part) for part in message["content"]]}
            if isinstance(message.get("content"), list)
            else message
            for message in messages
        ]

    def pieces_of(self, prompt: str) -> Iterator[str]:
        """The texts of a rendered prompt before, between and after its files. Raises Rejected for a template that
        leaves files out, or has them in another order."""
        *pieces, last = re.split(re.escape(self._name) + r"(\d+)__>", prompt)
        if (shown := [int(number) for number in pieces[1::2]]) != [*range(len(self.files))]:
            raise Rejected(
                f"this model's chat template shows {len(shown)} of {len(self.files)} pictures or sounds, or in another "
                "order; send them in messages of the user, or give the model another chat_template"
            )
        yield from pieces[::2]
        yield last

    def _marked(self, part: Part) -> Part:
        kind = part.get("type")
        if kind not in ("image", "audio"):
            return part
        what = "images" if kind == "image" else "sounds"
        if not (self.senses.pictures if kind == "image" else self.senses.sample_rate):
            raise Rejected(f"this model does not take {what}; give it a projector for them: mmproj in the catalogue")
        if len(self.files) == MOST_FILES:
            raise Rejected(f"the messages have more than {MOST_FILES} files; send fewer")
        self.files.append((kind, self._bytes_of(part["data"])))
        return {"type": "media_marker", "text": f"{self._name}{len(self.files) - 1}__>"}

    def _bytes_of(self, text: str) -> bytes:
        which = f"file {len(self.files) + 1}"
        try:
            file = b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise Rejected(f"{which} of the messages is not base64 ({error})") from error
        if len(file) > MOST_FILE_BYTES:
            most = format_bytes(MOST_FILE_BYTES)
            raise Rejected(f"{which} of the messages is {format_bytes(len(file))}; at most {most} are allowed")
        return file
