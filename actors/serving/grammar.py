"""A grammar that an answer must follow: which tokens may come next.

llama.cpp does not limit grammars: some overflow the stack, some compute for hours, and some throw an exception that
ends the process. So a grammar runs in a preparer's process, which has limits and may end, and never in a runner's.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import llama_cpp
import numpy as np

from actors.serving.llama_common import library
from actors.serving.vocabulary import Vocabulary
from scheduler.errors import Rejected

TOKEN, WORD, PATTERN, PATTERN_FULL = range(4)  # common_grammar_trigger_type, common.h


class Grammar:
    """`text`: GBNF. With `triggers` (of llama.cpp's chat code) every token is allowed until one of them has come.
    `begun`: tokens of the answer that are already in the prompt. Raises Rejected for a grammar that cannot be used."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        text: str,
        triggers: Sequence[Mapping[str, Any]] | None = None,
        begun: Iterable[int] = (),
    ) -> None:
        self._make = partial(_sampler_of, vocabulary, text, triggers)
        self._sampler = self._make()
        self._taken: list[int] = []
        self._impossible: set[int] = set()  # next, although the sampler does not say so
        self._tokens = (llama_cpp.llama_token_data * vocabulary.n_tokens)()
        self._view = np.ctypeslib.as_array(self._tokens)
        self._numbers = np.arange(vocabulary.n_tokens)
        for token in begun:
            if not self.take(token):
                raise Rejected("the chat template begins the answer with text that the grammar does not allow")

    def take(self, token: int) -> bool:
        """Go on with `token` if it may come next; False, and nothing changed, if it may not."""
        self._view[0] = token, 0.0, 0.0
        self._apply(1)
        if self._view[0]["logit"] < 0 or token in self._impossible:
            return False
        if not library().arriero_take(self._sampler, token):
            self._begin_again()
            self._impossible.add(token)
            return False
        self._taken.append(token)
        self._impossible.clear()
        return True

    def _begin_again(self) -> None:
        self.close()
        self._sampler = self._make()
        for token in self._taken:
            library().arriero_take(self._sampler, token)

    def allowed(self) -> bytes:
        """Every token that may come next, as bits: token 0 is the highest bit of the first byte."""
        self._view["id"], self._view["logit"] = self._numbers, 0.0
        self._apply(len(self._view))
        self._view["logit"][[*self._impossible]] = -1.0
        return np.packbits(self._view["logit"] >= 0).tobytes()

    def _apply(self, count: int) -> None:
        candidates = llama_cpp.llama_token_data_array(data=self._tokens, size=count, selected=-1, sorted=False)
        llama_cpp.llama_sampler_apply(self._sampler, ctypes.byref(candidates))

    def close(self) -> None:
        llama_cpp.llama_sampler_free(self._sampler)


def _sampler_of(vocabulary: Vocabulary, text: str, triggers: Sequence[Mapping[str, Any]] | None) -> Any:
    root = text.encode(), b"root"
    if triggers is None:
        sampler = llama_cpp.llama_sampler_init_grammar(vocabulary.pointer, *root)
    else:
        patterns = [_pattern(trigger) for trigger in triggers if trigger["type"] != TOKEN]
        tokens = [trigger["token"] for trigger in triggers if trigger["type"] == TOKEN]
        sampler = llama_cpp.llama_sampler_init_grammar_lazy_patterns(
            vocabulary.pointer, *root,
            (ctypes.c_char_p * len(patterns))(*patterns), len(patterns),
            (llama_cpp.llama_token * len(tokens))(*tokens), len(tokens),
        )  # fmt: skip
    if not sampler:
        raise Rejected("the schema or the tools give a grammar that llama.cpp cannot use; simplify them")
    return sampler


def _pattern(trigger: Mapping[str, Any]) -> bytes:
    """The regular expression of a trigger, as `common_sampler_init` makes it."""
    value: str = trigger["value"]
    if trigger["type"] == WORD:
        return re.sub(r"([.^$|()*+?\[\]{}\\])", r"\\\1", value).encode()
    if trigger["type"] == PATTERN_FULL:
        value = ("" if value.startswith("^") else "^") + value + ("" if value.endswith("$") else "$")
    return value.encode()
