"""What serving through Arriero costs over calling llama.cpp in one's own process, both measured in turn in one run.

Time to first token: a loaded model, streamed chat of one short message through the gateway, against the same through
`llama_cpp.Llama`. Decoding: one long streamed answer, the same on both sides. Cold load: `client.load` of an unloaded
model (page cache warm), against a `Llama(...)` call, in this process and in a fresh one. CPU only, the same threads on
both sides. Run: python -m benchmarks.serving
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from arriero.client import Client
from arriero.machine import end_ray, start_ray
from arriero.sample_models import write_sample_model
from benchmarks.table import print_table
from scheduler.config import Catalogue, ModelParams, Server

FIRST_TOKEN_ROUNDS = 60
DECODE_ROUNDS, DECODE_TOKENS = 7, 700
LOAD_ROUNDS = 7
N_CTX = 1024
SETTLE_S = 3.0
"""After a load its node starts another spare runner: no measurement is to hold that."""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_sample_model(Path(folder) / "bench.gguf", "llama", n_layer=6, n_embd=256)
        large = write_sample_model(Path(folder) / "large.gguf", "llama", n_layer=30, n_embd=512, n_ff=1536, n_head=8)
        state = start_ray()
        try:
            from actors.bootstrap import bring_up, take_down

            deployment = bring_up(
                Catalogue(model_paths=(folder,), defaults=ModelParams(n_ctx=N_CTX, n_batch=512), server=Server(port=0))
            )
            with Client(deployment.url) as client:
                first_token(client, path)
                decoding(client, path)
                cold_load(client, large)
            take_down()
        finally:
            end_ray(state)


def first_token(client: Client, path: Path) -> None:
    llama = _llama(path)
    through, alone = [], []
    client.load("bench")
    time.sleep(SETTLE_S)
    for round_number in range(FIRST_TOKEN_ROUNDS + 5):
        messages = [{"role": "user", "content": f"message number {round_number}"}]
        began = time.perf_counter()
        with client.chat("bench", messages, stream=True, temperature=0.0, max_tokens=4) as stream:
            pieces = iter(stream)
            next(pieces)
            through.append(time.perf_counter() - began)
            for _ in pieces:  # heard out: a stream that is left early costs a connection and a cancellation
                pass
        began = time.perf_counter()
        answers = llama.create_chat_completion(messages=messages, temperature=0.0, max_tokens=4, stream=True)
        while not next(answers)["choices"][0]["delta"].get("content"):
            pass
        alone.append(time.perf_counter() - began)
        for _ in answers:
            pass
    llama.close()
    through, alone = through[5:], alone[5:]  # the first ones warm caches and connections
    more = statistics.median(through) - statistics.median(alone)
    print_table(
        "Time to first token, loaded model (ms)",
        ("", "median", "p90"),
        [
            ("through the gateway", *_ms(through)),
            ("llama_cpp.Llama in-process", *_ms(alone)),
            ("more at the median", f"{more * 1e3:.1f}", ""),
        ],
    )


def decoding(client: Client, path: Path) -> None:
    llama = _llama(path)
    through, alone = [], []
    for _ in range(DECODE_ROUNDS):
        began = time.perf_counter()
        with client.complete("bench", "llamas", stream=True, temperature=0.0, max_tokens=DECODE_TOKENS) as stream:
            pieces = sum(1 for _ in stream)
        through.append(pieces / (time.perf_counter() - began))
        began = time.perf_counter()
        answers = llama.create_completion("llamas", stream=True, temperature=0.0, max_tokens=DECODE_TOKENS)
        pieces = sum(bool(answer["choices"][0]["text"]) for answer in answers)
        alone.append(pieces / (time.perf_counter() - began))
    llama.close()
    ratio = statistics.median(through) / statistics.median(alone)
    print_table(
        f"Decoding, a small model, one answer of {DECODE_TOKENS} tokens (pieces of text per second)",
        ("", "median", "worst"),
        [
            ("through the gateway", *_per_s(through)),
            ("llama_cpp.Llama in-process", *_per_s(alone)),
            ("ratio of the medians", f"{ratio:.2f}", ""),
        ],
    )


def cold_load(client: Client, path: Path) -> None:
    through, here, fresh = [], [], []
    for _ in range(LOAD_ROUNDS):
        time.sleep(SETTLE_S)
        client.unload("large")
        while client.status().replicas and any(r.model == "large" for r in client.status().replicas):
            time.sleep(0.05)
        began = time.perf_counter()
        client.load("large")
        through.append(time.perf_counter() - began)
        began = time.perf_counter()
        _llama(path).close()
        here.append(time.perf_counter() - began)
        program = f"import llama_cpp; llama_cpp.Llama({str(path)!r}, n_ctx={N_CTX}, verbose=False, flash_attn=True)"
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], check=True)
        fresh.append(time.perf_counter() - began)
    more = statistics.median(through) - statistics.median(here)
    print_table(
        f"Cold load, {path.stat().st_size / 2**20:.0f} MiB, page cache warm (s)",
        ("", "median", "worst"),
        [
            ("client.load", *_s(through)),
            ("llama_cpp.Llama(...) in a running process", *_s(here)),
            ("the same in a fresh process", *_s(fresh)),
            ("more than Llama alone, at the median", f"{more:.2f}", ""),
        ],
    )


def _llama(path: Path):  # type: ignore[no-untyped-def]
    import llama_cpp

    threads = psutil.cpu_count(logical=False)
    return llama_cpp.Llama(
        str(path),
        n_ctx=N_CTX,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        swa_full=False,
        verbose=False,
    )


def _ms(times: list[float]) -> tuple[str, str]:
    return f"{statistics.median(times) * 1e3:.1f}", f"{statistics.quantiles(times, n=10)[-1] * 1e3:.1f}"


def _per_s(rates: list[float]) -> tuple[str, str]:
    return f"{statistics.median(rates):.0f}", f"{min(rates):.0f}"


def _s(times: list[float]) -> tuple[str, str]:
    return f"{statistics.median(times):.2f}", f"{max(times):.2f}"


if __name__ == "__main__":
    main()
