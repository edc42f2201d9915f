"""A grammar that an answer must follow, made from a JSON schema: which tokens may come next.

llama.cpp's grammars have no bounds of their own: one schema overflows its stack, another computes for hours or throws
where C++ ends the process. So a grammar lives in a preparer's process, which has limits and may end, and never in a
runner's.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping

import llama_cpp
import numpy as np
from llama_cpp import llama_grammar

from actors.serving.vocabulary import Vocabulary
from scheduler.errors import Rejected


class Grammar:
    """Raises Rejected for a schema that gives no grammar."""

    def __init__(self, vocabulary: Vocabulary, schema: object) -> None:
        text = gbnf(schema).encode()
        self._sampler = llama_cpp.llama_sampler_init_grammar(vocabulary.pointer, text, b"root")
        if not self._sampler:
            raise Rejected("the JSON schema gives a grammar that llama.cpp cannot use; simplify the schema")
        self._tokens = (llama_cpp.llama_token_data * vocabulary.n_tokens)()
        self._view = np.ctypeslib.as_array(self._tokens)
        self._numbers = np.arange(vocabulary.n_tokens)

    def take(self, token: int) -> bool:
        """Go on with `token` if it may come next; False, and nothing changed, if it may not."""
        self._view[0] = token, 0.0, 0.0
        self._apply(1)
        if self._view[0]["logit"] < 0:
            return False
        llama_cpp.llama_sampler_accept(self._sampler, token)
        return True

    def allowed(self) -> bytes:
        """Every token that may come next, as bits: token 0 is the highest bit of the first byte."""
        self._view["id"], self._view["logit"] = self._numbers, 0.0
        self._apply(len(self._view))
        return np.packbits(self._view["logit"] >= 0).tobytes()

    def _apply(self, count: int) -> None:
        candidates = llama_cpp.llama_token_data_array(data=self._tokens, size=count, selected=-1, sorted=False)
        llama_cpp.llama_sampler_apply(self._sampler, ctypes.byref(candidates))

    def close(self) -> None:
        llama_cpp.llama_sampler_free(self._sampler)


def gbnf(schema: object) -> str:
    """llama.cpp's grammar for a JSON schema; the empty schema means any JSON object. Raises Rejected."""
    if not isinstance(schema, Mapping):
        raise Rejected(f"a JSON schema must be an object, not {type(schema).__name__}")
    if not schema:
        return str(llama_grammar.JSON_GBNF)
    try:
        return str(llama_grammar.json_schema_to_gbnf(json.dumps(schema)))
    except MemoryError:
        raise
    except Exception as error:  # the converter raises whatever it trips over
        raise Rejected(f"the JSON schema cannot be turned into a grammar: {type(error).__name__}: {error}") from error
