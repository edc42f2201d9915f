"""Likelihoods of tokens, as OpenAI's chats and responses tell them."""

from __future__ import annotations

from typing import Any

from actors.serving.protocol import Likelihood


def logprob_of(each: Likelihood) -> dict[str, Any]:
    """One token, and the likeliest ones there. Its text may be a piece of a character, its bytes are exact."""
    return {**_named(each.token, each.piece, each.logprob), "top_logprobs": [_named(*one) for one in each.top]}


def _named(token: int, piece: bytes, logprob: float | None) -> dict[str, Any]:
    return {"id": token, "token": piece.decode(errors="replace"), "bytes": list(piece), "logprob": logprob}
