"""Reading a header against `gguf.GGUFReader`, and the cost of one footprint.

Every reading runs in a process of its own, so that its memory is its own; files are warm in the page cache.
Vocabularies are made up, with two merges per token, as current models have. Run: python -m benchmarks.header
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.table import print_table
from scheduler.costs.footprint import footprint
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.params import ContextParams, DeviceSpec, Layout
from scheduler.costs.shape import read_shape

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "costs"))
files: Any = importlib.import_module("gguf_file")
shapes: Any = importlib.import_module("gguf_shapes")

VOCABULARIES = (32_000, 128_256, 262_144)
ROUNDS = 7

READ = """
import json, resource, sys, time
path, rounds, ours = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "ours"
if ours:
    from scheduler.costs.header import read_header as read
else:
    from gguf import GGUFReader as read
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cpu, seconds = [], []
for _ in range(rounds):
    began, cpu_began = time.perf_counter(), time.process_time()
    read(path)
    seconds.append(time.perf_counter() - began)
    cpu.append(time.process_time() - cpu_began)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([min(cpu), sorted(seconds)[len(seconds) // 2], peak * 1024]))
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        headers(Path(folder))
        footprints(Path(folder))


def headers(folder: Path) -> None:
    rows = []
    for n_vocab in VOCABULARIES:
        file = files.Gguf()
        file.set("general.architecture", "llama")
        files.add_vocabulary(file, n_vocab, n_merges=2 * n_vocab)
        file.tensors = [(f"blk.{il // 9}.weight{il}", (4096, 4096), "q4_K") for il in range(290)]
        path = file.write(folder / f"{n_vocab}.gguf")
        size = len(file.header()) / 2**20
        for name, rounds in (("ours", ROUNDS), ("GGUFReader", 1)):
            cpu, median, memory = measured(path, rounds, name)
            figures = (f"{cpu * 1e3:.0f} ms", f"{median * 1e3:.0f} ms", f"{memory / 2**20:.1f} MiB")
            rows.append((f"{n_vocab} tokens, {size:.1f} MiB", name, *figures))
    print_table("Reading a header", ("header", "reader", "CPU time", "wall, median", "memory added"), rows)


def measured(path: Path, rounds: int, name: str) -> tuple[float, float, int]:
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path), str(rounds), name], capture_output=True, text=True, check=True
    )
    cpu, median, memory = json.loads(done.stdout)
    return cpu, median, memory


def footprints(folder: Path) -> None:
    rows = []
    for name in ("llama-3.1-8b", "qwen3-32b", "qwen3-30b-a3b", "deepseek-v2-lite"):
        shape = read_shape(shapes.write_model(shapes.GOLDEN[name], folder / f"{name}.gguf", vocabulary=False))
        layout = Layout(tuple(DeviceSpec(f"gpu{i}") for i in range(4)), -1, (4, 3, 2, 1))
        seconds = []
        for _ in range(200):
            began = time.perf_counter()
            footprint(shape, layout, ContextParams(n_ctx=32768, n_seq_max=4), CHECKED_BUILD)
            seconds.append(time.perf_counter() - began)
        seconds.sort()
        rows.append((name, str(shape.n_layer_all), f"{seconds[100] * 1e6:.0f} us", f"{seconds[198] * 1e6:.0f} us"))
    print_table("One footprint on four devices", ("model", "layers", "median", "p99"), rows)


if __name__ == "__main__":
    main()
