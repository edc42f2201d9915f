"""How soon a long chat goes on whose cells were taken meanwhile, with saved states and without.

    python -m benchmarks.conversations [--rounds 3] [--models small half] [--parts evicted shared copies]

*evicted*: two models take turns in single active model mode, on the CPU. Each has a chat of 4,000 tokens that grows by
a few tokens each turn. Printed are the median seconds to the first token of a turn, the loads included, and of the same
turn where the model stayed loaded; and how much of the prompt was known.
*shared*: one model stays loaded. Two requests begin with a system prompt of 4,000 tokens, then long prompts of others
take the whole cache, while a short answer is under way; then a third request begins with the system prompt. Printed are
the median seconds to its first token, how much was known, and the longest pause of the answer that was under way.
*copies*: how long the engine's thread is held up by a state of 4,000 tokens, and how long other threads work for it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from actors.serving.engine import Engine
from actors.serving.protocol import GenerateRequest, LoadSpec, content_of
from benchmarks.http_load import ask_all, streamed
from benchmarks.models import write_model
from benchmarks.serving import SHAPES, arriero
from benchmarks.table import print_table
from scheduler.costs.params import ContextParams

N_TOKENS = 4000
TABLES = {
    "evicted": (
        f"A chat of {N_TOKENS:,} tokens on two models that take turns",
        ("model", "states", "first token after a swap, s", "known", "without a swap, s", "known"),
    ),
    "shared": (
        f"A system prompt of {N_TOKENS:,} tokens whose cells were taken by others",
        ("model", "states", "first token, s", "known", "longest pause of another answer, ms"),
    ),
    "copies": (
        f"A state of {N_TOKENS:,} tokens",
        ("model", "MB", "out of the cache, ms", "completed, ms", "found and read, ms", "into the cache, ms"),
    ),
}
KEPT_BYTES = 8 * 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["small", "half"])
    parser.add_argument("--parts", nargs="+", choices=TABLES, default=list(TABLES))
    given = parser.parse_args()
    rows: dict[str, list[list[str]]] = {part: [] for part in TABLES}
    for model in given.models:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
            (folder / "models").mkdir()
            first = write_model(folder / "models" / "a.gguf", SHAPES[model])
            if "copies" in given.parts:
                rows["copies"] += [[model, *_copies(first)] for _ in range(given.rounds)]
            for kept in (0, KEPT_BYTES):
                states = "saved" if kept else "read again"
                if "shared" in given.parts:
                    with arriero(folder / "models", saved_state_bytes=kept) as url:
                        rows["shared"].append([model, states, *_shared(url, given.rounds)])
                if "evicted" in given.parts:
                    (folder / "models" / "b.gguf").write_bytes(first.read_bytes() + b"\0")
                    with arriero(folder / "models", max_active_models=1, saved_state_bytes=kept) as url:
                        rows["evicted"].append([model, states, *_turns(url, given.rounds)])
                    (folder / "models" / "b.gguf").unlink()
    for part, (title, columns) in TABLES.items():
        if part in given.parts:
            print_table(title, columns, rows[part])


def _turns(url: str, rounds: int) -> list[str]:
    chats = {model: random.Random(model).choices(range(10, 1000), k=N_TOKENS) for model in ("a", "b")}
    for model, chat in chats.items():
        _ask(url, model, chat)
    swapped: list[tuple[float, int]] = []
    stayed: list[tuple[float, int]] = []
    for _ in range(rounds):
        for model, chat in chats.items():
            chat += [1001, 1002, 1003, 1004]
            swapped.append(_ask(url, model, chat))
            chat += [1005, 1006, 1007, 1008]
            stayed.append(_ask(url, model, chat))
    return [text for turns in (swapped, stayed) for text in _figures(turns)]


def _shared(url: str, rounds: int) -> list[str]:
    asked: list[tuple[float, int]] = []
    pauses: list[float] = []
    _ask(url, "a", [5])
    for number in range(rounds):
        chance = random.Random(number)
        system, *others = (chance.choices(range(10, 1000), k=N_TOKENS) for _ in range(4))
        for last in (1001, 1002):
            _ask(url, "a", [*system, last])
        with ThreadPoolExecutor(1) as beside:
            running = beside.submit(ask_all, url, [streamed("a", "Where is the salt?", 64)], 1)
            for other in others:
                _ask(url, "a", other)
            (answer,), _ = running.result()
        pauses.append(1000 * max(answer.gaps_s()))
        asked.append(_ask(url, "a", [*system, 1003]))
    return [*_figures(asked), f"{statistics.median(pauses):.0f}"]


def _copies(path: Path) -> list[str]:
    """In this process, through the parts that an engine has for it."""
    context = ContextParams(n_ctx=2 * N_TOKENS, n_seq_max=2, kv_unified=True)
    spec = LoadSpec("a", str(path), (), 0, (), "", context, os.cpu_count() or 1, 0, saved_state_bytes=KEPT_BYTES)
    prompt = random.Random(path.name).choices(range(10, 1000), k=N_TOKENS)
    took_ms: list[float] = []

    def timed(work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        took_ms.append(1000 * (time.perf_counter() - began))
        return result

    with closing(Engine(spec)) as engine:
        list(engine.generate(GenerateRequest(content_of(prompt=prompt), max_tokens=0)))
        engine._batcher.close()  # from here on this thread has the context
        model, keeper = engine._model, engine._keeper
        assert keeper is not None, "the spec has room for states"
        slot = engine._batcher.slots()[0]
        n_bytes = model.sequence_bytes(slot.sequence)
        timed(lambda: keeper.keep(slot, n_bytes, lambda into: model.save_sequence(slot.sequence, into), str))
        timed(keeper.close)
        saved = timed(lambda: keeper.find([*prompt, 1], 0, ()))
        assert saved is not None, "it was not worth it"
        model.clear(slot.sequence)
        assert timed(lambda: model.load_sequence(slot.sequence, saved.state))
        saved.path.unlink()
    return [f"{n_bytes / 1e6:.0f}", *(f"{ms:.1f}" for ms in took_ms)]


def _figures(turns: list[tuple[float, int]]) -> tuple[str, str]:
    seconds = statistics.median(seconds for seconds, _ in turns)
    return f"{seconds:.2f}", f"{statistics.median(count for _, count in turns):.0f} tokens"


def _ask(url: str, model: str, prompt: list[int]) -> tuple[float, int]:
    """Seconds to an answer of one token, and how many tokens of the prompt were known."""
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    began = time.perf_counter()
    with urllib.request.urlopen(request) as reply:
        answer: dict[str, Any] = json.load(reply)
    return time.perf_counter() - began, answer["usage"]["prompt_tokens_details"]["cached_tokens"]


if __name__ == "__main__":
    main()
