"""The protocol of a runner and its preparer, in frames. The runner asks, the preparer answers:

READ path, 0, template   -> READY, or REJECTED (on the control socket, before all else; no template: the file's)
PREPARE slot, content    -> STEP* (BEFORE (PICTURE | SOUND))* PROMPT*
                            READY {"stops", "constrained", "syntax", "preserved", "biases", "thinking", "held_bytes"},
                            or EXAMINED bytes it holds, the answer itself; or REJECTED
CONSTRAIN slot, content  -> STEP* READY: the grammar of another answer to the same request; nothing else is made of it
TRY token                -> TAKEN bytes it holds, or ALLOWED those, bits: only these tokens may come next
SYNTAX how to read it    -> TAKEN bytes it holds, or REJECTED; until the answer ends, it is asked nothing else
SAID text, or ENDS text  -> DELTAS what it adds to the message (ENDS: nothing follows, CUT: more would have)
(whoever was asked ended) -> ENDED why
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from scheduler.errors import Rejected

SLOT = struct.Struct("<I?I")
"""Tokens that a slot holds, and the `Senses` of its model."""
TOKEN = struct.Struct("<i")
HELD = struct.Struct("<Q")
"""Bytes of memory that a child holds, beyond what it was forked with."""
SIZE = struct.Struct("<II")
"""Width and height of a picture, before its pixels (red, green, blue; a byte each)."""


class Kind(IntEnum):
    READ = 0
    PREPARE = 1
    STEP = 2  # what is being done: an error names it if the child ends over it
    PROMPT = 3  # tokens, 4 bytes each
    READY = 4
    REJECTED = 5
    TRY = 6
    TAKEN = 7
    ALLOWED = 8
    ENDED = 9
    SYNTAX = 10
    SAID = 11
    ENDS = 12
    CUT = 13
    DELTAS = 14
    EXAMINED = 15
    BEFORE = 16  # tokens of a prompt that come before a picture or a sound, 4 bytes each
    PICTURE = 17
    SOUND = 18  # samples, floats of 4 bytes
    CONSTRAIN = 19


class Senses(NamedTuple):
    """What a model takes besides text. `sample_rate`: of sounds, in Hz; 0: it takes none."""

    pictures: bool = False
    sample_rate: int = 0


def prompt_too_long(n_tokens: int, n_ctx: int) -> Rejected:
    """Of a prompt that leaves its slot no room; whichever of the two sees it first."""
    return Rejected(
        f"prompt is {n_tokens} tokens; the slot holds {n_ctx} with the answer. "
        "Shorten the prompt or load the model with a larger n_ctx",
        prompt_tokens=n_tokens,
        n_ctx=n_ctx,
    )
