"""Work of many sources on few threads: one source cannot have them all."""

from __future__ import annotations

import threading

from actors.serving.fair_threads import FairThreads


def test_one_source_has_a_part_of_the_threads_and_its_work_is_done_in_order() -> None:
    threads = FairThreads(8, 2, "test")
    go, done, lock = threading.Event(), [], threading.Lock()

    def work(name: str, waits: bool) -> None:
        if waits:
            go.wait(10)
        with lock:
            done.append(name)

    for number in range(20):
        threads.submit("ann", lambda number=number: work(f"ann-{number}", True))
    bob = threading.Event()
    threads.submit("bob", bob.set)
    assert bob.wait(10), "ann's work keeps bob waiting"
    assert not done
    go.set()
    last = threading.Event()
    threads.submit("ann", last.set)
    assert last.wait(10)
    threads.shutdown()
    assert sorted(done) == sorted(f"ann-{number}" for number in range(20))
    assert not threads._begun and not threads._waiting


def test_what_waits_at_the_end_is_not_done() -> None:
    threads = FairThreads(1, 1, "test")
    began, go = threading.Event(), threading.Event()
    threads.submit("ann", lambda: (began.set(), go.wait(10)))
    threads.submit("ann", lambda: 1 / 0)
    assert began.wait(10)
    threading.Timer(0.1, go.set).start()
    threads.shutdown()
