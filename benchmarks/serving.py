"""How fast answers come through Arriero, beside llama.cpp's own server on the same files and cores.

    python -m benchmarks.serving [--llama-server PATH] [--rounds 3] [--models tiny small half ...] [--no-swaps]

Each round starts one side after the other, alone, and asks both the same: streamed completions of new prompts of 64
words at 1, 4 and 8 clients, requests for one token, and swaps of two models of which one at a time may be loaded
(llama-server's router; Arriero's single active model). Both have four slots, as many threads as there are cores, and
the CPU alone. With `--models sampled-152k sampled-262k encoder` it asks for answers that are sampled from large
vocabularies, and for embeddings of texts of 64 words from an encoder, 32 to a request; with `chat` for chats instead of
completions; with the path of a GGUF file for completions of that model. Before each measurement the machine is waited
for to be quiet. Medians of the rounds are printed, and the ratio of the two sides. Without --llama-server only Arriero
is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from benchmarks.http_load import Answer, ask_all, quantile, streamed, streamed_chat
from benchmarks.models import (
    GEMMA_VOCABULARY,
    QWEN_HALF_B,
    QWEN_VOCABULARY,
    SMALL,
    TINY,
    Shape,
    words,
    write_encoder,
    write_model,
)
from benchmarks.table import print_table

N_SLOTS, N_CTX = 4, 2048  # tokens of a slot
WORDS = 64
SAMPLED = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
"""llama.cpp's defaults, said: each side would else fill in its own."""


@dataclass(frozen=True, slots=True)
class Case:
    """`tokens`: of an answer, so many that a measurement takes seconds. `more`: of a request's body."""

    tokens: int
    clients: Sequence[int]
    more: Mapping[str, float] = field(default_factory=dict)
    chats: bool = False


CASES: Mapping[str, Case] = {
    "tiny": Case(400, (1, 4, 8)),
    "small": Case(128, (1, 4, 8)),
    "chat": Case(128, (1, 4, 8), chats=True),
    "half": Case(48, (1, 4)),
    "sampled-152k": Case(200, (1, 4), SAMPLED),
    "sampled-262k": Case(200, (1, 4), SAMPLED),
}
A_FILE = Case(96, (1, 4))
SHAPES: Mapping[str, Shape] = {
    "tiny": TINY, "small": SMALL, "chat": SMALL, "half": QWEN_HALF_B, "sampled-152k": QWEN_VOCABULARY,
    "sampled-262k": GEMMA_VOCABULARY,
}  # fmt: skip
ENCODER, TEXTS, REQUESTS = "encoder", 32, 12  # texts of a request for embeddings
ONE_TOKEN_ROUNDS, SWAP_ROUNDS = 60, 9
QUIET_PERCENT, QUIET_S, PATIENCE_S = 15.0, 1.0, 120.0

Results = dict[tuple[str, str], list[float]]
"""Figures of all rounds, by what was measured and by side."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", type=Path, help="an executable, built from the same sources")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["tiny", "small", "half"],
        metavar="MODEL",
        help=f"any of {', '.join(CASES)} and {ENCODER}, or the path of a GGUF file",
    )
    parser.add_argument("--no-swaps", action="store_true")
    parser.add_argument("--busy", action="store_true", help="do not wait until the machine is quiet")
    given = parser.parse_args()
    files = {Path(model).stem: Path(model).resolve() for model in given.models if model.endswith(".gguf")}
    given.models = [model.removesuffix(".gguf").rpartition("/")[2] for model in given.models]
    if unknown := [model for model in given.models if model not in {*CASES, ENCODER, *files}]:
        parser.error(f"there is no case {unknown[0]}: name any of {', '.join(CASES)} and {ENCODER}, or a GGUF file")
    results: Results = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in given.models:
            path = folder / f"{model}.gguf"
            if model in files:
                path.symlink_to(files[model])
            elif model == ENCODER:
                write_encoder(path)
            else:
                write_model(path, SHAPES[model])
        if not given.no_swaps:
            first = write_model(folder / "swap-a.gguf", QWEN_HALF_B)
            (folder / "swap-b.gguf").write_bytes(first.read_bytes())
        for number in range(given.rounds):
            print(f"round {number + 1} of {given.rounds}", flush=True)
            _measure_arriero(folder, given, results)
            if given.llama_server:
                _measure_llama_server(folder, given, results)
    _print(results, bool(given.llama_server))


# ---------------------------------------------------------------------- the two sides


def _measure_arriero(folder: Path, given: argparse.Namespace, results: Results) -> None:
    with arriero(folder) as url:
        for model in given.models:
            _measure(url, model, "Arriero", results)
    if not given.no_swaps:
        with arriero(folder, max_active_models=1) as url:
            _swap(url, "Arriero", results)


def _measure_llama_server(folder: Path, given: argparse.Namespace, results: Results) -> None:
    for model in given.models:
        embeds = ("--embeddings", "--pooling", "mean") if model == ENCODER else ()
        with llama_server(given.llama_server, "--model", str(folder / f"{model}.gguf"), *embeds) as url:
            _measure(url, model, "llama-server", results)
    if not given.no_swaps:
        with llama_server(given.llama_server, "--models-dir", str(folder), "--models-max", "1") as url:
            _swap(url, "llama-server", results)


@contextlib.contextmanager
def arriero(folder: Path, **policy: int) -> Iterator[str]:
    """The URL of a service on a Ray of its own, in a process of its own: a process connects to one Ray in its life."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_run_arriero, args=[str(folder), policy, theirs])
    child.start()
    theirs.close()  # so that a child that fails is an end of file, not a wait for ever
    try:
        yield ours.recv()
    finally:
        with contextlib.suppress(BrokenPipeError):
            ours.send("end")
        child.join()


def _run_arriero(folder: str, policy: dict[str, int], pipe: Connection) -> None:
    import os

    from arriero.machine import end_ray, start_ray
    from scheduler.config import Catalogue, ModelParams, Policy
    from scheduler.server import Server

    state = start_ray()
    try:
        from actors.bootstrap import bring_up, take_down  # imports Ray, which must not be before it is started

        catalogue = Catalogue(
            model_paths=(folder,),
            defaults=ModelParams(n_ctx=N_SLOTS * N_CTX, n_seq_max=N_SLOTS, kv_unified=True),
            server=Server(port=0),
            policy=Policy(**policy),
        )
        pipe.send(bring_up(catalogue).url)
        pipe.recv()
        take_down()
    finally:
        end_ray(state)
        os._exit(0)  # Ray's own end would wait for the head that is gone


@contextlib.contextmanager
def llama_server(path: Path, *options: str) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    threads = str(psutil.cpu_count(logical=False))
    process = subprocess.Popen(
        [path, *options, "--port", str(port), "-t", threads, "-np", str(N_SLOTS), "-c", str(N_SLOTS * N_CTX), "-kvu"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while not _healthy(url):
            if process.poll() is not None:
                raise RuntimeError(f"{path} ended with status {process.returncode}")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


# ---------------------------------------------------------------------- what is measured


def _measure(url: str, model: str, side: str, results: Results) -> None:
    if model == ENCODER:
        _measure_encoder(url, side, results)
        return
    prompts, case = _prompts(), CASES.get(model, A_FILE)
    ask_all(url, [streamed(model, next(prompts), 8)], 1)  # loads it
    ask = streamed_chat if case.chats else streamed
    for clients in case.clients:
        n_requests = max(4, 2 * clients)
        bodies = [ask(model, next(prompts), case.tokens, **case.more) for _ in range(n_requests)]
        _wait_until_quiet()
        answers, seconds = ask_all(url, bodies, clients)
        results[f"{model}, tokens/s at {clients}", side].append(sum(answer.tokens for answer in answers) / seconds)
        gaps_s = [gap for answer in answers for gap in answer.gaps_s()]
        results[f"{model}, p95 between tokens at {clients}, ms", side].append(1e3 * quantile(gaps_s, 0.95))
    _wait_until_quiet()
    short = (" ".join(next(prompts).split()[:8]) for _ in range(ONE_TOKEN_ROUNDS))
    firsts_s = [ask_all(url, [ask(model, prompt, 1)], 1)[0][0].first_s for prompt in short]
    results[f"{model}, first token, ms", side].append(1e3 * statistics.median(firsts_s))


def _measure_encoder(url: str, side: str, results: Results) -> None:
    prompts = _prompts()

    def embed(n_texts: int) -> None:
        body = json.dumps({"model": ENCODER, "input": [next(prompts) for _ in range(n_texts)]}).encode()
        request = urllib.request.Request(f"{url}/v1/embeddings", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            assert len(json.load(answer)["data"]) == n_texts

    embed(1)  # loads it
    for clients in (1, 4):
        _wait_until_quiet()
        began_s = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(embed, [TEXTS] * REQUESTS))
        results[f"{ENCODER}, texts/s at {clients}", side].append(TEXTS * REQUESTS / (time.perf_counter() - began_s))


def _swap(url: str, side: str, results: Results) -> None:
    prompts = _prompts()
    warm_s, swapped_s = [], []
    for model in itertools.islice(itertools.cycle(("swap-a", "swap-b")), SWAP_ROUNDS + 2):
        _wait_until_quiet()
        swapped_s.append(_one(url, model, next(prompts)[:20]).first_s)
        _wait_until_quiet()
        warm_s += [_one(url, model, next(prompts)[:20]).first_s for _ in range(3)]
    results["swap beyond a warm request, ms", side].append(
        1e3 * (statistics.median(swapped_s[2:]) - statistics.median(warm_s))
    )


def _one(url: str, model: str, prompt: str) -> Answer:
    (answer,), _ = ask_all(url, [streamed(model, prompt, 1)], 1)
    return answer


def _prompts() -> Iterator[str]:
    """Of 64 words each, and no two begin alike."""
    chance, known = random.Random(time.time()), words()
    while True:
        yield " ".join(chance.choices(known, k=WORDS))


def _wait_until_quiet() -> None:
    """Returns when the cores have been idle for a moment. Raises TimeoutError after two minutes."""
    if "--busy" in sys.argv:
        return
    began_s = time.monotonic()
    while psutil.cpu_percent(QUIET_S) > QUIET_PERCENT:
        if time.monotonic() - began_s > PATIENCE_S:
            raise TimeoutError("something else computes on this machine; measurements would mean nothing")


# ---------------------------------------------------------------------- what is printed


def _print(results: Results, both: bool) -> None:
    rows = []
    for what in dict.fromkeys(what for what, _ in results):
        ours = results[what, "Arriero"]
        row = [what, _median(ours)]
        if both:
            rival = results[what, "llama-server"]
            row += [_median(rival), f"{statistics.median(ours) / statistics.median(rival):.2f}"]
        rows.append(row)
    columns = ("", "Arriero", "llama-server", "ratio") if both else ("", "Arriero")
    print_table("Medians of the rounds (lowest and highest)", columns, rows)


def _median(values: Sequence[float]) -> str:
    number: Callable[[float], str] = "{:.0f}".format if min(values) >= 100 else "{:.1f}".format
    return f"{number(statistics.median(values))} ({number(min(values))}–{number(max(values))})"


if __name__ == "__main__":
    main()
