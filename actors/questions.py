"""Questions to the actors of nodes and GPUs, by their names, each with a time limit."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from ray.exceptions import RayActorError

from actors.names import node_name
from actors.spares import RunnerHandle

QUESTION_TIMEOUT_S = 10.0
WORDS_TIMEOUT_S = 2.0  # a node that was lost with its runner says nothing, and requests wait for what follows

log = logging.getLogger(__name__)


class Questions:
    """Belongs to one event loop."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._actors: dict[str, Any] = {}  # a handle outlives the restarts of its actor

    async def ask(
        self, name: str, method: str, *arguments: object, timeout_s: float | None = QUESTION_TIMEOUT_S
    ) -> Any:
        """The answer of a node's or a GPU's actor. One that has ended for good is looked up again the next time."""
        if name not in self._actors:
            # A blocking question to the head: off the event loop, where every request passes.
            self._actors[name] = await asyncio.to_thread(ray.get_actor, name, self._namespace)
        try:
            return await asyncio.wait_for(getattr(self._actors[name], method).remote(*arguments), timeout_s)
        except RayActorError:
            self._actors.pop(name, None)
            raise

    async def sample(self, name: str) -> Any:
        try:
            return await self.ask(name, "sample_now")
        except Exception as error:
            log.warning("%s could not be read: %s", name, brief(error))
            return None

    async def last_words(self, runner: RunnerHandle | None) -> str:
        if runner is None or runner.process is None:
            return ""
        try:
            node = node_name(runner.node_id)
            return str(await self.ask(node, "last_words", runner.process, timeout_s=WORDS_TIMEOUT_S))
        except Exception as error:  # its node may be lost as well
            log.warning("%s left no last words: %s", runner.name, brief(error))
            return ""


def brief(error: BaseException) -> str:
    """The first line of what it says, or its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
