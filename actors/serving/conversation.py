"""What goes on with a child of the preparer after a request was prepared: tokens are tried against a grammar, or the
answer is parsed. Each has a connection to a child of its own, and gives it back at its end.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from actors.frames import receive, send
from actors.serving.child_memory import Held
from actors.serving.dialogue import HELD, TOKEN, Kind
from actors.serving.protocol import Delta, FinishReason
from scheduler.errors import EngineFailed, Rejected

Pick = Callable[[npt.NDArray[np.bool_] | None], int]
GiveBack = Callable[[socket.socket, int], None]  # a connection, and how many bytes its child holds


MOST_TRIED = 8
"""Tokens that seem to be allowed and are not, one after the other: they spoil the beginning of a call. A guess."""


class Constraint:
    """What the tokens of one answer must follow. One thread chooses; any thread may `interrupt`."""

    def __init__(self, connection: socket.socket, give_back: GiveBack, held: Held) -> None:
        self._connection = connection
        self._give_back = give_back
        self._held = held
        self._usable = True
        self._closed = False

    def choose(self, pick: Pick) -> int:
        """The next token: what `pick(None)` picks, or, where that may not come next, what it picks among those that
        may (one flag per token). Raises Rejected when there is none, or llama.cpp cannot tell."""
        allowed = self._try(token := pick(None))
        for _ in range(MOST_TRIED):
            if allowed is None:
                return token
            if not allowed.any():
                break
            allowed = self._try(token := pick(allowed))  # one that begins a call wrongly shows it only now
        raise Rejected("the JSON schema requires text that this model's tokens cannot form")

    def _try(self, token: int) -> npt.NDArray[np.bool_] | None:
        """None when the answer goes on with `token`, else which tokens may come next."""
        try:
            send(self._connection, Kind.TRY, TOKEN.pack(token))
            frame = receive(self._connection)
        except OSError as error:
            self._usable = False
            raise EngineFailed(f"its preparer has ended ({error})") from error
        kind, payload = frame if frame is not None else (Kind.ENDED, b"it ended")
        if kind in (Kind.TAKEN, Kind.ALLOWED):
            self._usable = False  # if it has grown too large
            self._held.resize(HELD.unpack_from(payload)[0])
            self._usable = True
        if kind == Kind.TAKEN:
            return None
        if kind == Kind.ALLOWED:
            return np.unpackbits(np.frombuffer(payload, np.uint8, offset=HELD.size)).astype(np.bool_)
        self._usable = False
        if kind == Kind.REJECTED:
            raise rejected("the JSON schema", payload)
        raise Rejected(f"the JSON schema cannot be followed: {payload.decode()}; simplify it")

    def interrupt(self) -> None:
        """Whoever is choosing stops, with an error."""
        self._usable = False
        shut(self._connection)

    def close(self) -> None:
        """The answer has ended, and nobody is choosing. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._usable:
            self._give_back(self._connection, self._held.n_bytes)
        else:
            self._connection.close()
        self._held.free()


class Parsing:
    """Parses one answer, in a child of the preparer. One thread at a time."""

    def __init__(self, connection: socket.socket, give_back: GiveBack, held: Held) -> None:
        self._connection = connection
        self._give_back = give_back
        self._held = held
        self._usable = True

    def feed(self, text: str, *, last: FinishReason | None = None) -> tuple[Delta, ...]:
        """What the next piece of text adds to the message. `last`: nothing follows, and why. Raises EngineFailed, and
        Unavailable where all answers under way hold too much."""
        kind = Kind.SAID if last is None else Kind.ENDS if last == "stop" else Kind.CUT
        try:
            send(self._connection, kind, text.encode())
            frame = receive(self._connection)
        except OSError as error:
            self._usable = False
            raise EngineFailed(f"its preparer has ended ({error})") from error
        if frame is None or frame[0] != Kind.DELTAS:
            self._usable = False
            if frame is None:
                raise EngineFailed("its preparer has ended")
            raise Rejected(f"the answer cannot be parsed: {frame[1].decode()}")  # not the preparer's fault
        self._usable = False  # if it has grown too large
        self._held.resize(HELD.unpack_from(frame[1])[0])
        self._usable = True
        return tuple(_delta(told) for told in json.loads(frame[1][HELD.size :]))

    def close(self) -> None:
        """The answer has ended."""
        if self._usable:
            self._give_back(self._connection, self._held.n_bytes)
        else:
            self._connection.close()
        self._held.free()


def shut(connection: socket.socket) -> None:
    """Whoever waits on it, on either side, is told that it has ended."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _delta(told: dict[str, Any]) -> Delta:
    return Delta(
        told.get("content", ""),
        told.get("reasoning_content", ""),
        told.get("index"),
        told.get("name", ""),
        told.get("arguments", ""),
    )


def rejected(step: str, payload: bytes) -> Rejected:
    """What a child refused, and over which step."""
    told: dict[str, Any] = json.loads(payload)
    return Rejected(told["message"], **{"step": step, **told["details"]})
