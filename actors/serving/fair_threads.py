"""Threads for the work of many sources (API keys, or addresses): none of them can have all."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

Work = Callable[[], object]


class FairThreads:
    """At most `at_once` pieces of work are done, and at most `of_one` of one source; others of it wait in their order.
    Work raises nothing. Any thread may `submit`."""

    def __init__(self, at_once: int, of_one: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(at_once, name)
        self._of_one = of_one
        self._lock = Lock()
        self._begun: Counter[str] = Counter()
        self._waiting: defaultdict[str, deque[Work]] = defaultdict(deque)

    def submit(self, source: str, work: Work) -> None:
        with self._lock:
            if self._begun[source] >= self._of_one:
                self._waiting[source].append(work)
                return
            self._begun[source] += 1
        self._threads.submit(self._do, source, work)

    def _do(self, source: str, work: Work) -> None:
        work()
        with self._lock:
            if not self._waiting[source]:
                del self._waiting[source]
                self._begun[source] -= 1
                if not self._begun[source]:
                    del self._begun[source]
                return
            following = self._waiting[source].popleft()
        self._threads.submit(self._do, source, following)

    def shutdown(self) -> None:
        """Waits for what was begun; what waits is not done."""
        with self._lock:
            self._waiting.clear()
        self._threads.shutdown(cancel_futures=True)
