"""How soon a long chat goes on whose model was evicted meanwhile, with saved states and without.

    python -m benchmarks.conversations [--rounds 3] [--models small half]

Two models take turns in single active model mode, on the CPU. Each has a chat of 4,000 tokens that grows by a few
tokens each turn. Printed are the median seconds to the first token of a turn, the loads included, and of the same turn
where the model stayed loaded; and how much of the prompt was known.
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
from pathlib import Path
from typing import Any

from benchmarks.models import write_model
from benchmarks.serving import CASES, arriero
from benchmarks.table import print_table

N_TOKENS = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=CASES, default=["small", "half"])
    given = parser.parse_args()
    rows = []
    for model in given.models:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
            (folder / "models").mkdir()
            first = write_model(folder / "models" / "a.gguf", CASES[model].shape)
            (folder / "models" / "b.gguf").write_bytes(first.read_bytes() + b"\0")
            for kept in (0, 8 * 2**30):
                with arriero(folder / "models", max_active_models=1, saved_state_bytes=kept) as url:
                    turns = _turns(url, given.rounds)
                rows.append([model, "saved" if kept else "read again", *turns])
    columns = ("model", "states", "first token after a swap, s", "known", "without a swap, s", "known")
    print_table(f"A chat of {N_TOKENS:,} tokens on two models that take turns", columns, rows)


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
