"""Sends a monitor's readings to the scheduler actor, in the monitor's own thread, at most one at a time.

A scheduler that restarts or is busy must not find a queue of old readings. So while a report is unanswered, no other is
sent, and the monitor offers a newer sample later. A report that fails is dropped: the handle stays valid when the
scheduler restarts, and the next report is tried.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

_log = logging.getLogger(__name__)


class Reporter:
    """Calls a method of the scheduler actor, one call at a time; does not wait for it. Safe from several threads."""

    def __init__(self, method: Any) -> None:
        self._method = method
        self._on_its_way: Any = None
        self._lock = threading.Lock()

    def __call__(self, reading: object) -> bool:
        """Send `reading`; False when it was not sent, because the last one is still on its way."""
        with self._lock:
            if self._on_its_way is not None and not self._arrived():
                return False
            self._on_its_way = self._method.remote(reading)
            return True

    def _arrived(self) -> bool:
        arrived, _ = ray.wait([self._on_its_way], timeout=0)
        if not arrived:
            return False
        try:
            ray.get(self._on_its_way)
        except ray.exceptions.RayError as error:
            _log.info("a report did not reach the scheduler, the next one may: %s", error)
        return True


def every(period_s: float, work: Callable[[], object], name: str, *, rest: float = 0.0) -> threading.Event:
    """Do `work` every `period_s` seconds in a daemon thread, starting now. The returned event ends it when it is set.

    Errors are logged, and the work is tried again. After slow work the thread sleeps at least `rest` times as long as
    the work took: 19 limits the cost to a twentieth of one core.
    """

    ended = threading.Event()

    def repeat() -> None:
        while not ended.is_set():
            began = time.monotonic()
            try:
                work()
            except Exception:
                _log.exception("%s failed and will be tried again", name)
            took_s = time.monotonic() - began
            ended.wait(max(period_s - took_s, rest * took_s))

    threading.Thread(target=repeat, name=name, daemon=True).start()
    return ended
