"""Questions about a model's vocabulary and template, which need no computing: llama-server's tokenize, detokenize and
apply-template."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from actors.serving.vocabulary import Vocabulary
from scheduler.errors import Rejected


def examined(vocabulary: Vocabulary, asked: Mapping[str, Any], render: Callable[[Mapping[str, Any]], str]) -> object:
    """The answer to `asked`, for JSON: to {"tokenize": text, "add_special", "parse_special", "with_pieces"},
    {"detokenize": token ids}, or {"apply_template": a chat, as a request has it}. `render`: a chat's prompt."""
    if "tokenize" in asked:
        tokens = vocabulary.tokenize(
            asked["tokenize"], asked.get("add_special", False), parse_special=asked.get("parse_special", True)
        )
        if not asked.get("with_pieces", False):
            return {"tokens": tokens}
        return {"tokens": [{"id": token, "piece": _readable(vocabulary.piece(token))} for token in tokens]}
    if "detokenize" in asked:
        tokens = asked["detokenize"]
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary.n_tokens:
            raise Rejected(f"tokens: this model's tokens are 0 to {vocabulary.n_tokens - 1}")
        return {"content": b"".join(map(vocabulary.piece, tokens)).decode(errors="replace")}
    return {"prompt": render(asked["apply_template"])}


def _readable(piece: bytes) -> str | list[int]:
    """As text, or as its bytes where it is none."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
