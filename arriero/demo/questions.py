"""Asks the models, one after the other or all at once, with streaming. Keeps every answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from arriero.api import ArrieroError
from arriero.client import Client
from arriero.demo.screen import Screen

MAX_TOKENS = 20


@dataclass(frozen=True, slots=True)
class Asked:
    """One question and its answer. `error` is empty when `text` is complete. Times are seconds."""

    model: str
    prompt: str
    text: str
    first_s: float
    total_s: float
    error: str = ""


def ask(client: Client, model: str, prompt: str, screen: Screen) -> Asked:
    """Ask one question and show the answer as it comes."""
    began = time.monotonic()
    first_s = 0.0
    pieces: list[str] = []
    error = ""
    line = screen.line(model, prompt)
    try:
        with client.chat(model, prompt, stream=True, temperature=0.0, max_tokens=MAX_TOKENS) as stream:
            for piece in stream:
                first_s = first_s or time.monotonic() - began
                pieces.append(piece)
                line.add(piece)
    except ArrieroError as failed:
        error = failed.message
    asked = Asked(model, prompt, "".join(pieces), first_s, time.monotonic() - began, error)
    line.end(asked.first_s, asked.total_s, error)
    return asked


def ask_in_turn(client: Client, questions: Sequence[tuple[str, str]], screen: Screen) -> list[Asked]:
    return [ask(client, model, prompt, screen) for model, prompt in questions]


def ask_all_at_once(client: Client, questions: Sequence[tuple[str, str]], screen: Screen) -> list[Asked]:
    with ThreadPoolExecutor(len(questions)) as pool:
        return list(pool.map(lambda question: ask(client, question[0], question[1], screen), questions))
