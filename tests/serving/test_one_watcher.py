"""A runner is watched by one call at a time, however many schedulers come and go."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

from actors.serving.protocol import BufferSizes, DeviceBuffers, LoadSpec
from actors.serving.runner import Runner
from scheduler.costs.params import ContextParams

SPEC = LoadSpec("m", "/models/m.gguf", (), 0, (), False, ContextParams(), 1, 0)


def test_a_new_watcher_ends_the_one_before_and_hears_of_the_end() -> None:
    engine: Any = SimpleNamespace(
        buffers=BufferSizes((), DeviceBuffers(), 0, 256), set_threads=lambda n: None, active_requests=(), broken=""
    )
    runner = Runner("r1", SPEC, lambda spec, endpoints, progress: engine)
    runner.load()
    heard: list[str] = []
    watchers = [threading.Thread(target=lambda: heard.append(runner.watch())) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
    while not heard:  # whichever came first has to end
        time.sleep(0.01)
    assert heard == ["another call watches"]
    engine.broken = "llama_decode failed"
    for watcher in watchers:
        watcher.join(30)
    assert heard == ["another call watches", "llama_decode failed"]
