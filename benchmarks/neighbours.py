"""How long a running stream stands still for what a neighbour sends to the same replica.

    python -m benchmarks.neighbours [--seconds 10]

One replica on the CPU with a vocabulary of 151,936 tokens; one greedy stream, and beside it one neighbour after the
other, again and again for so many seconds. Printed are the stream's gaps between two tokens, in milliseconds. A quiet
machine is wanted: gaps are what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from actors.serving.engine import Engine
from actors.serving.protocol import GenerateRequest, LoadSpec, Sampling, content_of
from benchmarks.models import Shape, write_model
from benchmarks.table import print_table
from scheduler.costs.params import ContextParams
from scheduler.errors import ArrieroError

SHAPE = Shape(n_vocab=151_936, n_embd=256, n_ff=768, n_layer=6, n_head=4, n_head_kv=4, weights=GGMLQuantizationType.F16)
N_CTX = 32768
MIB = 1024 * 1024


def schema(of: dict[str, Any]) -> bytes:
    return content_of(prompt="Answer:", json_schema=of)


NEIGHBOURS: dict[str, bytes | None] = {
    "nobody": None,
    "plain answers": content_of(prompt="Where is the salt?"),
    "any JSON object": schema({}),
    "a schema of ten fields": schema(
        {"type": "object", "properties": {f"field{i}": {"type": "string"} for i in range(10)}}
    ),
    "an enum of 1,000": schema({"enum": [f"value{i}" for i in range(1000)]}),
    "an enum of 100,000": schema({"enum": [f"value{i}" for i in range(100_000)]}),
    "500 bounded repetitions": schema({"anyOf": [{"type": "string", "maxLength": 50 + i} for i in range(500)]}),
    "maxLength 20,000": schema({"type": "string", "maxLength": 20_000}),
    "a prompt of 31 MiB": content_of(prompt="salt and maize " * (31 * MIB // 15)),
    "a prompt of 32,000 tokens": content_of(prompt=[5] * 32_000),
}
"""What they send, as the gateway would hand it over."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each neighbour")
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as folder:
        spec = LoadSpec(
            model="neighbours",
            path=str(write_model(Path(folder) / "model.gguf", SHAPE, N_CTX)),
            devices=(),
            n_gpu_layers=0,
            tensor_split=(),
            experts_pattern="",
            context=ContextParams(n_ctx=4 * N_CTX, n_seq_max=4, n_ubatch=64),
            n_threads=1,
            host_required_bytes=0,
        )
        with contextlib.closing(Engine(spec)) as engine:
            rows = [[name, *measure(engine, content, seconds)] for name, content in NEIGHBOURS.items()]
    print_table(
        "A stream beside neighbours",
        ["neighbour", "requests", "refused", "tokens/s", "gap p50 ms", "p99 ms", "max ms"],
        rows,
    )


def measure(engine: Engine, content: bytes | None, seconds: float) -> list[str]:
    """Requests of the neighbour and how many were refused; the stream's tokens a second, and its gaps."""
    stopping = threading.Event()
    counts = {"sent": 0, "refused": 0}
    beside = threading.Thread(target=_pester, args=(engine, content, stopping, counts))
    stream = _stream(engine, content_of(prompt="Tell me of the llamas."), None)
    next(stream)
    if content is not None:
        beside.start()
    gaps_s = []
    began = last = time.perf_counter()
    while last - began < seconds:
        next(stream)
        now = time.perf_counter()
        gaps_s.append(now - last)
        last = now
    stopping.set()
    stream.close()
    if content is not None:
        while beside.is_alive():
            engine.cancel("neighbour")
            beside.join(0.1)
    gaps_ms = 1000 * np.array(gaps_s)
    figures = (len(gaps_s) / seconds, *np.quantile(gaps_ms, (0.5, 0.99)), gaps_ms.max())
    return [str(counts["sent"]), str(counts["refused"]), *(f"{figure:.1f}" for figure in figures)]


def _pester(engine: Engine, content: bytes, stopping: threading.Event, counts: dict[str, int]) -> None:
    while not stopping.is_set():
        counts["sent"] += 1
        try:
            for _ in _stream(engine, content, 8):
                if stopping.is_set():
                    break
        except ArrieroError:
            counts["refused"] += 1


def _stream(engine: Engine, content: bytes, max_tokens: int | None) -> Any:
    never_ends = {SHAPE.n_vocab - 1: -100.0} if max_tokens is None else None
    return engine.generate(
        GenerateRequest(
            content,
            "stream" if max_tokens is None else "neighbour",
            max_tokens,
            sampling=Sampling(temperature=0, logit_bias=never_ends),
        )
    )


if __name__ == "__main__":
    main()
