"""Pictures and sounds are encoded beside the engine's thread: that takes up to seconds, and other answers go on.

One at a time: a projector has one set of buffers. Sources take turns (`fairness`), and what nobody waits for any more
is not begun. Each is encoded in a thread of its own: OpenMP keeps a team of threads for every thread that has computed,
and with a second team the engine's threads would sleep at every barrier. So it must end.
What was begun cannot be stopped. The node hears of each (`beat`): one that hangs is ended with its process.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock, Thread
from typing import NamedTuple

from actors.serving.beat import Beat
from actors.serving.fairness import Rotation
from actors.serving.generation import Choice, Generation
from actors.serving.model import Model
from actors.serving.pieces import Medium
from scheduler.errors import ArrieroError, EngineFailed

Told = Callable[[Generation, Choice | ArrieroError], object]


class _Encoding(NamedTuple):
    job: Generation
    medium: Medium
    tell: Told


class Encoder:
    """`begin` and `close` belong to the engine's thread."""

    def __init__(self, model: Model, beat: Beat) -> None:
        self._model, self._beat = model, beat
        self._lock = Lock()  # for all below
        self._waiting: list[_Encoding] = []
        self._sources = Rotation[str]()
        self._thread: Thread | None = None  # that encodes

    def begin(self, job: Generation, medium: Medium, tell: Told) -> None:
        """Another thread makes the embedding of `medium`, which `job` reads next, and tells when it is there: a choice
        without a token. Who has left by then hears nothing, or too late."""
        with self._lock:
            self._waiting.append(_Encoding(job, medium, tell))
            self._sources.keep(each.job.source for each in self._waiting)
            if self._thread is None:
                self._begin_next()

    def close(self) -> None:
        """Waits for what is being encoded; what waits is not."""
        with self._lock:
            self._waiting.clear()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _begin_next(self) -> None:
        self._waiting = [each for each in self._waiting if not each.job.ended and not each.job.cancelled]
        self._sources.keep(each.job.source for each in self._waiting)
        self._thread = None
        if self._waiting:
            following = min(self._waiting, key=lambda each: self._sources.place(each.job.source))
            self._waiting.remove(following)
            self._thread = Thread(target=self._encode, args=following, name="encoding", daemon=True)
            self._thread.start()

    def _encode(self, job: Generation, medium: Medium, tell: Told) -> None:
        outcome: Choice | ArrieroError = Choice(None)
        try:
            if medium.embedding is None:  # several answers may read the same picture
                with self._beat.computing(medium.n_tokens, "sounds" if medium.is_sound else "pictures"):
                    self._model.encode(medium)
        except ArrieroError as error:
            outcome = error
        except Exception as error:
            outcome = EngineFailed(f"a picture could not be encoded ({type(error).__name__}: {error})")
        tell(job, outcome)
        with self._lock:
            self._sources.serve([job.source])
            self._begin_next()
