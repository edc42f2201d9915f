"""Server-sent events with a name, as Anthropic's API and OpenAI's responses have them."""

from __future__ import annotations

import json
from typing import Any


def named_event(kind: str, **told: Any) -> bytes:
    """One event. Its data says its name, too."""
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), json.dumps({"type": kind, **told}).encode())
