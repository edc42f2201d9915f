"""Whose turn it is to bring Arriero up on a Ray cluster, or to take it down: one driver's at a time.

The turn is an actor with a name, which Ray gives to one only. It is not detached: a driver that ends, however it does,
gives its turn back.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from scheduler.errors import Unavailable

TURN = "turn"
NAMESPACE = "arriero-turn"  # of its own: in Arriero's everything is ended by whoever has the turn
LONGEST_S = 300.0  # longer than any start: nodes have 60 s to join, actors 120 s to answer and 30 s to end
LOOK_EVERY_S = 0.25
ANSWER_S = 5.0


class _Turn:
    """Holds the name, and tells who has it."""

    def __init__(self, holder: str) -> None:
        self._holder = holder

    def holder(self) -> str:
        return self._holder


_TurnActor: Any = ray.remote(num_cpus=0)(_Turn)


@contextlib.contextmanager
def turn(say: Callable[[str], object], longest_s: float = LONGEST_S) -> Iterator[None]:
    """Wait for the turn, saying for whom, and keep it for the block.

    Raises Unavailable that names the holder when it has not come after `longest_s` seconds.
    """
    deadline = time.monotonic() + longest_s
    me = f"process {os.getpid()} on {socket.gethostname()}"
    while True:
        try:
            actor = _TurnActor.options(name=TURN, namespace=NAMESPACE).remote(me)
            break
        except ValueError:  # the name is taken
            holder = _holder()
        if time.monotonic() > deadline:
            raise Unavailable(
                f"{holder} has been starting or stopping Arriero on this cluster for more than "
                f"{longest_s:.0f} s; wait for it, or end it and try again",
                retry_after_s=10.0,
            )
        say(f"waiting for {holder}, which starts or stops Arriero on this cluster")
        time.sleep(LOOK_EVERY_S)
    try:
        yield
    finally:
        ray.kill(actor)


def _holder() -> str:
    with contextlib.suppress(ValueError, RayError, GetTimeoutError):
        holder: str = ray.get(ray.get_actor(TURN, namespace=NAMESPACE).holder.remote(), timeout=ANSWER_S)
        return holder
    return "somebody else"
