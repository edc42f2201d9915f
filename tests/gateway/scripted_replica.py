"""A replica without a model, for a real `Listener`: it says the words of its prompt, or of the last message."""

from __future__ import annotations

import json
import os
import threading
from array import array
from collections.abc import Callable
from typing import Any

from actors.serving.jobs import Embedded, Hearer, Job
from actors.serving.preparation import Errand
from actors.serving.protocol import Chunk, EmbedRequest, GenerateRequest
from scheduler.errors import Rejected


class ScriptedReplica:
    """Words with a meaning: "refuse", "crash" (a bug), "die" (the process ends), "wait" (silence until it is dropped),
    "flood" (words for as long as somebody takes them, at most 100,000)."""

    def __init__(self) -> None:
        self.asked: list[GenerateRequest | EmbedRequest] = []
        self.ended: list[str] = []  # leases
        self._changed = threading.Condition()
        self.said = 0

    def prepare(
        self, request: GenerateRequest | EmbedRequest, hearer: Hearer[Any], errand: Errand | None = None
    ) -> Job[Any]:
        content = json.loads(request.content)
        self.asked.append(request)
        if isinstance(request, EmbedRequest):
            words = content["inputs"]
        else:
            words = (content["prompt"] if "prompt" in content else content["messages"][-1]["content"]).split()
        if "refuse" in words:
            raise Rejected("prompt is 5000 tokens; the slot holds 4096", n_ctx=4096)
        if "crash" in words:
            raise ZeroDivisionError("a bug")
        return _Script(request, words, hearer, self._note_end)

    def submit(self, job: Job[Any]) -> None:
        threading.Thread(target=self._play, args=[job], daemon=True).start()

    def drop(self, job: Job[Any]) -> None:
        with self._changed:
            job.cancelled = True
            self._changed.notify_all()

    def resume(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def wait_for_end(self, lease_id: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: lease_id in self.ended, 20)

    def _play(self, job: Job[Any]) -> None:
        assert isinstance(job, _Script)
        if isinstance(job.request, EmbedRequest):
            for left, _ in zip(range(len(job.words) - 1, -1, -1), job.words, strict=True):
                job.hearer.say(Embedded(array("f", [1.0]), 2, left))
        else:
            for word in job.words:
                if word == "die":
                    os._exit(1)
                for _ in range(100_000 if word == "flood" else 1):
                    with self._changed:
                        self._changed.wait_for(
                            lambda word=word: job.cancelled or (word != "wait" and not job.hearer.stalled)
                        )
                    if job.cancelled:
                        break
                    self.said += 1
                    job.hearer.say(Chunk(word))
                    job.hearer.flush()
            if not job.cancelled:
                job.hearer.say(Chunk("", "stop", 1, 0, 2))
        job.end()

    def _note_end(self, lease_id: str) -> None:
        with self._changed:
            self.ended.append(lease_id)
            self._changed.notify_all()


class _Script(Job[Any]):
    def __init__(
        self,
        request: GenerateRequest | EmbedRequest,
        words: list[str],
        hearer: Hearer[Any],
        closed: Callable[[str], None],
    ) -> None:
        super().__init__(request.lease_id, [1], hearer)
        self.request = request
        self.words = words
        self._closed = closed

    def close(self) -> None:
        self._closed(self.lease_id)
