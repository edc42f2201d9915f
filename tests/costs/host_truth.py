"""A program that loads a model as a runner does and prints what its process grew by: run by test_host_memory.

Reads one request (JSON) and prints bytes of anonymous and of file-backed memory: after loading, at the peak of loading,
and after the largest batch.
"""

from __future__ import annotations

import json
import sys
import threading

import jinja2.sandbox  # noqa: F401  as in a runner that waits for its model
import llama_cpp  # noqa: F401

from actors.serving.model import Row
from actors.serving.native import NativeModel
from actors.serving.protocol import LoadSpec
from scheduler.costs.params import ContextParams


def resident() -> tuple[int, int]:
    with open("/proc/self/status") as file:  # noqa: PTH123  (quick: it is read all the time)
        sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in file if line.startswith("Rss")}
    return sizes["RssAnon"], sizes["RssFile"]


class Peak(threading.Thread):
    """The most anonymous memory that was seen while it ran."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.001):
            self.most = max(self.most, resident()[0])


def main() -> None:
    request = json.load(sys.stdin)
    context = ContextParams(**request.pop("context"))
    spec = LoadSpec("m", devices=(), n_gpu_layers=0, tensor_split=(), experts_pattern="", context=context,
                    n_threads=2, host_required_bytes=0, **request)  # fmt: skip
    anonymous, mapped = resident()
    peak = Peak()
    peak.start()
    model = NativeModel(spec, (), lambda progress: None)
    loaded = resident()
    peak.over.set()
    peak.join()
    n = min(context.n_ubatch, context.n_ctx)
    rows = [Row(5, i, 0, wants_logits=True) for i in range(n)]
    if context.embeddings:
        model.embed(rows)
    else:
        n_outputs = context.n_outputs_max or 1
        model.decode([row._replace(wants_logits=row.position >= n - n_outputs) for row in rows])
    used = resident()
    print(
        json.dumps(
            {
                "loaded_bytes": loaded[0] - anonymous,
                "peak_bytes": max(peak.most, loaded[0]) - anonymous,
                "used_bytes": used[0] - anonymous,
                "mapped_bytes": loaded[1] - mapped,
            }
        )
    )


if __name__ == "__main__":
    main()
