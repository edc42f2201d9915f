"""A runner's side of its preparer: it turns requests into prompts, and tries tokens against grammars.

`Preparer()` starts the process (see `preparer`), which may be before its model is known. `read` tells it the file and
returns before the vocabulary is read. Every method may be called from any thread. A request that the preparer refuses,
or that ends it, is Rejected, with the step that it was busy with. A preparer that is gone is started again. Cost of a
request: one round trip on a socket pair.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from actors.devices.processes import look_at
from actors.frames import BrokenFrame, receive, send
from actors.serving.child_memory import ChildMemory
from actors.serving.conversation import Constraint, Parsing, rejected, shut
from actors.serving.dialogue import HELD, SLOT, Kind, Senses
from actors.serving.pieces import NO_MEDIA, Eyes, Media, Reading
from actors.serving.thoughts import ThinkingBudget, Thoughts
from scheduler.errors import EngineFailed, Rejected
from scheduler.units import MIB

ANSWER_TIMEOUT_S = 60.0
"""For a preparer that is stopped or gets no CPU time. It limits its own computing, to less than this."""

MOST_IDLE, MOST_IDLE_BYTES = 2, 16 * MIB
"""Connections (each a child of the preparer) that are kept for the next requests, and what such a child may hold."""

_SOURCE_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Prepared:
    """`prompts`: tokens of each; `stops`: strings that end the answer; `constraint`: what its tokens must follow.

    `syntax`: of an answer that must be parsed (`Preparer.parsing`), or None. `preserved`: special tokens that are text.
    `biases`: of tokens that were named by their text. `thinking`: how thoughts begin and end, where they are limited.
    `examined`: the answer itself, as JSON, to what needs no model. `media`: of a prompt that has pictures or sounds.
    """

    prompts: tuple[list[int], ...]
    stops: tuple[str, ...]
    constraint: Constraint | None = None
    syntax: bytes | None = None
    preserved: frozenset[int] = frozenset()
    biases: Mapping[int, float] = field(default_factory=dict)
    thinking: Mapping[str, Any] | None = None
    examined: str | None = None
    media: Media = NO_MEDIA
    held_bytes: int = 0  # what the child that made it holds

    def budget(self) -> ThinkingBudget | None:
        """What limits the thoughts of one answer."""
        if self.thinking is None:
            return None
        thoughts = Thoughts(self.thinking["start_tag"], self.thinking["end_tags"], self.thinking["begun"])
        return ThinkingBudget(thoughts, self.thinking["n_tokens"], self.thinking["closing"])

    def close(self) -> None:
        """For a request that comes to nothing."""
        if self.constraint is not None:
            self.constraint.close()


class Errand:
    """A preparation whose client may leave: `end` it from any thread, before, during or after it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._connection: socket.socket | None = None
        self._ended = False

    def begin(self, connection: socket.socket) -> None:
        """It is done on this connection now."""
        with self._lock:
            self._connection = connection
            if self._ended:
                shut(connection)

    def finish(self) -> None:
        """It is done."""
        with self._lock:
            self._connection = None

    def end(self) -> None:
        """Cancel it: whoever waits for it gets an error, and the child that computes is killed."""
        with self._lock:
            self._ended = True
            if self._connection is not None:
                shut(self._connection)


class Preparer:
    """One model's. `close()` ends the process."""

    def __init__(self) -> None:
        self._model = b""
        self._lock, self._idle_lock = Lock(), Lock()
        self._idle: list[socket.socket] = []
        self._memory = ChildMemory()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._start()

    def read(self, path: str, chat_template: str = "") -> None:
        """Tell it its model's file, and a chat template in place of the file's. Once, before anything is prepared."""
        with self._lock:
            self._model = os.fsencode(Path(path).absolute()) + b"\0" + chat_template.encode()
            self._tell_model()

    def prepare(
        self, content: bytes, n_ctx: int, errand: Errand | None = None, eyes: Eyes | None = None, source: str = ""
    ) -> Prepared:
        """The prompts of a request's content, for slots of `n_ctx` tokens. Ending the `errand` ends the wait for them.
        `eyes`: of a model that takes pictures or sounds. `source`: who asks.

        Raises Rejected for a request that cannot be made into one, EngineFailed when there is no preparer to ask,
        Unavailable when grammars of others under way leave no memory for this one.
        """
        return self._asked(Kind.PREPARE, content, n_ctx, errand, eyes, source)

    def constraint(
        self, content: bytes, n_ctx: int, errand: Errand | None, eyes: Eyes | None, source: str = ""
    ) -> Constraint:
        """What another answer to the same request must follow; the caller closes it. Its pictures are not opened again.
        Raises as `prepare` does."""
        constraint = self._asked(Kind.CONSTRAIN, content, n_ctx, errand, eyes, source).constraint
        if constraint is None:
            raise EngineFailed("its preparer made a grammar for one answer, and none for the next")
        return constraint

    def _asked(
        self, kind: Kind, content: bytes, n_ctx: int, errand: Errand | None, eyes: Eyes | None, source: str
    ) -> Prepared:
        connection = self._connection()
        errand = errand or Errand()
        try:
            errand.begin(connection)
            senses = eyes.senses if eyes is not None else Senses()
            send(connection, kind, SLOT.pack(n_ctx, *senses), content)
            prepared = self._answer(connection, Reading(eyes, n_ctx), source)
        except TimeoutError as error:
            connection.close()  # which ends the child
            self._end_if_stopped()
            raise EngineFailed(f"its preparer did not answer for {ANSWER_TIMEOUT_S:.0f} s") from error
        except OSError as error:
            connection.close()
            raise EngineFailed(f"its preparer has ended ({error}); try again") from error
        except BaseException:
            connection.close()
            raise
        finally:
            errand.finish()
        if prepared.constraint is None:
            self._keep(connection, prepared.held_bytes)
        return prepared

    def parsing(self, syntax: bytes, source: str = "") -> Parsing:
        """What parses an answer that was prepared with `syntax`, for `source`. Raises EngineFailed when there is no
        preparer, and Rejected and Unavailable as `prepare`."""
        connection = self._connection()
        try:
            send(connection, Kind.SYNTAX, syntax)
            frame = receive(connection)
            if frame is None or frame[0] != Kind.TAKEN:
                raise Rejected(f"its answer cannot be parsed: {frame[1].decode() if frame else 'the parser has ended'}")
            return Parsing(connection, self._keep, self._memory.hold(source, HELD.unpack(frame[1])[0]))
        except OSError as error:
            connection.close()
            raise EngineFailed(f"its preparer has ended ({error}); try again") from error
        except BaseException:
            connection.close()
            raise

    def _answer(self, connection: socket.socket, reading: Reading, source: str) -> Prepared:
        prompts: list[list[int]] = []
        step = "the request"
        while (frame := receive(connection)) is not None:
            kind, payload = frame
            match kind:
                case Kind.STEP:
                    step = payload.decode()
                case Kind.PROMPT:
                    prompts.append(reading.finish(payload))
                case Kind.BEFORE:
                    reading.add_text(payload)
                case Kind.PICTURE | Kind.SOUND:
                    reading.add_file(kind, payload)
                case Kind.READY:
                    if reading.refusal is not None:
                        raise reading.refusal
                    ready = json.loads(payload)
                    held_bytes = int(ready["held_bytes"])
                    constraint: Constraint | None = None
                    if ready["constrained"]:
                        constraint = Constraint(connection, self._keep, self._memory.hold(source, held_bytes))
                    syntax = json.dumps(ready["syntax"]).encode() if ready["syntax"] else None
                    return Prepared(
                        tuple(prompts),
                        tuple(ready["stops"]),
                        constraint,
                        syntax,
                        frozenset(ready["preserved"]),
                        dict(ready["biases"]),
                        ready["thinking"],
                        media=Media(reading.media),
                        held_bytes=held_bytes,
                    )
                case Kind.EXAMINED:
                    told = payload[HELD.size :].decode()
                    return Prepared((), (), examined=told, held_bytes=HELD.unpack_from(payload)[0])
                case Kind.REJECTED:
                    raise rejected(step, payload)
                case Kind.ENDED:
                    raise Rejected(f"{step} cannot be used: {payload.decode()}", step=step)
                case _:
                    raise BrokenFrame(f"it answered with a frame of kind {kind}")
        raise ConnectionError("it said nothing")

    def _keep(self, connection: socket.socket, held_bytes: int) -> None:
        """Let the next request have the connection, unless it is closed or its child is large."""
        with self._idle_lock:  # the other lock is held while a process starts
            usable = connection.fileno() >= 0 and held_bytes <= MOST_IDLE_BYTES
            if usable and not self._closed and len(self._idle) < MOST_IDLE:
                self._idle.append(connection)
                return
        connection.close()

    # ------------------------------------------------------------------ the process

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            # It sees no GPUs, whatever the runner sees. What C++ prints when it dies is of no use.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "actors.serving.preparer", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=_SOURCE_ROOT,  # "-m" looks here first, wherever this process was started
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
                pass_fds=[theirs.fileno()],
            )
        self._control.settimeout(ANSWER_TIMEOUT_S)
        self._is_ready = False
        if self._model:
            self._tell_model()

    def _tell_model(self) -> None:
        with contextlib.suppress(OSError):  # it has ended: the first request will notice
            send(self._control, Kind.READ, self._model)

    def _connection(self) -> socket.socket:
        """A connection to an idle child, or to a new one."""
        with self._lock:
            if self._closed:
                raise EngineFailed("this replica is being stopped")
            while (connection := self._idle_one()) is not None:
                if not _has_ended(connection):
                    return connection
                connection.close()
            for _ in range(2):
                try:
                    return self._new_connection()
                except (OSError, EngineFailed) as error:
                    trouble = error
                    self._end_process()
                    self._start()
        raise EngineFailed(f"its preparer does not start: {trouble}")

    def _idle_one(self) -> socket.socket | None:
        with self._idle_lock:
            return self._idle.pop() if self._idle else None

    def _new_connection(self) -> socket.socket:
        if not self._is_ready:
            frame = receive(self._control)
            if frame is None or frame[0] != Kind.READY:
                raise EngineFailed(frame[1].decode() if frame else "it ended at once")
            self._is_ready = True
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [b"c"], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        ours.settimeout(ANSWER_TIMEOUT_S)
        return ours

    def _end_if_stopped(self) -> None:
        """A process that is stopped makes no children: the next request gets another. One that goes on belongs to other
        requests, too."""
        with self._lock:
            look = look_at(self._process.pid) if self._process is not None else None
            if look is None or look.stopped:
                self._end_process()

    def _end_process(self) -> None:
        self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Ends the process; requests under way fail with EngineFailed. Safe to call twice."""
        with self._lock:
            if self._closed:
                return
            with self._idle_lock:
                self._closed = True
            while (connection := self._idle_one()) is not None:
                connection.close()
            self._end_process()


def _has_ended(connection: socket.socket) -> bool:
    """Whether the other side has ended, or has said why it ends, while nobody was asking."""
    try:
        connection.setblocking(False)
        return len(connection.recv(1, socket.MSG_PEEK)) >= 0
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(ANSWER_TIMEOUT_S)
