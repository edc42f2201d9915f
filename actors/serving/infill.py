"""Fill-in-the-middle: the prompt that asks for what stands between a beginning and an end, as llama-server makes it.

    [REP] repository [SEP] file, text … [SEP] file  [PRE] beginning [SUF] end [MID]

What stands nearest to the gap is kept when it is too long for the slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import llama_cpp

from actors.serving.vocabulary import Vocabulary
from scheduler.errors import Rejected

_REPOSITORY, _FILE = "myproject\n", "filename\n"  # llama-server's: models are used to names, whichever they are
_SNIPPET = "\n\n--- snippet ---\n\n"


def infill_prompt(vocabulary: Vocabulary, wanted: Mapping[str, Any], n_ctx: int) -> list[int]:
    """`wanted`: input_prefix, input_suffix; and if there are, input_extra (texts with their filename), and prompt (how
    the middle begins). Half of the slot is for the answer and what is extra, 3/8 for the beginning, 1/8 for the end.

    Raises Rejected for a model that does not know how.
    """
    pointer = vocabulary.pointer
    before, after, middle = (
        llama_cpp.llama_vocab_fim_pre(pointer),
        llama_cpp.llama_vocab_fim_suf(pointer),
        llama_cpp.llama_vocab_fim_mid(pointer),
    )
    if min(before, after, middle) < 0:
        raise Rejected("this model cannot fill in the middle of a text: its vocabulary has no tokens for it")
    begun = _tokens(vocabulary, wanted.get("prompt", ""))
    prefix = _tokens(vocabulary, wanted["input_prefix"])[-max(1, 3 * n_ctx // 8) :]
    suffix = _tokens(vocabulary, wanted["input_suffix"])[: max(0, n_ctx // 8 - 2 - len(begun))]
    opening = [llama_cpp.llama_vocab_bos(pointer)] if llama_cpp.llama_vocab_get_add_bos(pointer) else []
    extra = _extra(vocabulary, wanted.get("input_extra", ()))[-(n_ctx // 4) :]
    return [*extra, *opening, before, *prefix, *begun, after, *suffix, middle]


def _extra(vocabulary: Vocabulary, texts: Any) -> list[int]:
    """Other files of the same repository."""
    repository = llama_cpp.llama_vocab_fim_rep(vocabulary.pointer)
    separator = llama_cpp.llama_vocab_fim_sep(vocabulary.pointer)
    tokens = [repository, *_tokens(vocabulary, _REPOSITORY)] if repository >= 0 else []
    for each in texts:
        if separator >= 0:
            tokens += [separator, *_tokens(vocabulary, each.get("filename", "tmp") + "\n")]
        else:
            tokens += _tokens(vocabulary, _SNIPPET)
        tokens += _tokens(vocabulary, each["text"])
    return tokens + ([separator, *_tokens(vocabulary, _FILE)] if separator >= 0 else [])


def _tokens(vocabulary: Vocabulary, text: str) -> list[int]:
    return vocabulary.tokenize(text, add_special=False, parse_special=False)
