"""Pictures and sounds are encoded beside the engine's thread: that takes up to seconds, and other answers go on.

One at a time: a projector has one set of buffers. Each in a thread of its own: OpenMP keeps a team of threads for every
thread that has computed, and with a second team the engine's threads would sleep at every barrier. So it must end.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock, Thread

from actors.serving.generation import Choice, Generation
from actors.serving.model import Model
from actors.serving.pieces import Medium
from scheduler.errors import ArrieroError, EngineFailed

Told = Callable[[Generation, Choice | ArrieroError], object]


class Encoder:
    """`begin` and `close` belong to the engine's thread."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._turn = Lock()
        self._threads: list[Thread] = []

    def begin(self, job: Generation, medium: Medium, tell: Told) -> None:
        """Another thread makes the embedding of `medium`, which `job` reads next, and tells when it is there: a choice
        without a token. A cancelled job may have ended by then."""
        thread = Thread(target=self._encode, args=(job, medium, tell), name="encoding", daemon=True)
        self._threads = [each for each in self._threads if each.is_alive()] + [thread]
        thread.start()

    def close(self) -> None:
        """Waits for what is being encoded."""
        for thread in self._threads:
            thread.join()

    def _encode(self, job: Generation, medium: Medium, tell: Told) -> None:
        outcome: Choice | ArrieroError = Choice(None)
        try:
            with self._turn:
                if medium.embedding is None and not job.ended and not job.cancelled:
                    self._model.encode(medium)
        except ArrieroError as error:
            outcome = error
        except Exception as error:
            outcome = EngineFailed(f"a picture could not be encoded ({type(error).__name__}: {error})")
        tell(job, outcome)
