"""What answers in several APIs tell alike, in llama-server's words: how likely tokens were, and how long it took."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from actors.serving.protocol import Chunk, Likelihood


def likelihood_of(each: Likelihood) -> dict[str, Any]:
    """Of a token and of those that were likeliest in its place."""
    return {**_named(each.token, each.piece, each.logprob), "top_logprobs": [_named(*one) for one in each.top]}


def in_json(told: Iterable[object]) -> Iterator[str]:
    """Of an answer that is sent whole, while it is made: the likelihoods of 16,000 tokens at its end would take 0.1 s,
    in a thread that has other answers to go on with."""
    return map(json.dumps, told)


def _named(token: int, piece: bytes, logprob: float | None) -> dict[str, Any]:
    return {"id": token, "token": piece.decode(errors="replace"), "bytes": list(piece), "logprob": logprob}


def timings_of(last: Chunk) -> dict[str, Any]:
    """In llama-server's words: milliseconds, tokens, and tokens a second. Of one answer, or not at all."""
    if last.timings is None:
        return {}
    n_prompt, n_answer = last.prompt_tokens - last.cached_tokens, last.completion_tokens
    prompt_s, answer_s = max(last.timings.prompt_s, 1e-6), max(last.timings.answer_s, 1e-6)
    drafted = {"draft_n": last.timings.draft_n, "draft_n_accepted": last.timings.draft_n_accepted}
    return {
        "timings": {
            "cache_n": last.cached_tokens,
            "prompt_n": n_prompt,
            "prompt_ms": 1e3 * prompt_s,
            "prompt_per_token_ms": 1e3 * prompt_s / max(1, n_prompt),
            "prompt_per_second": n_prompt / prompt_s,
            "predicted_n": n_answer,
            "predicted_ms": 1e3 * answer_s,
            "predicted_per_token_ms": 1e3 * answer_s / max(1, n_answer),
            "predicted_per_second": n_answer / answer_s,
            **(drafted if last.timings.draft_n else {}),
        }
    }
