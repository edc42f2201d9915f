"""A model's own prediction layers (nextn, MTP): they guess next tokens from what the model has just computed.

They run in a second context of the model, with a cache of its own, and read every batch right after the model: what
they read is the model's last activations, which are gone with the next batch. So what they missed they never learn.
Where their guesses do not pay they rest; a sequence that they missed tokens of begins for them where they look again.
llama.cpp always computes as many guesses as there may be at once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import llama_cpp

from actors.serving.buffers import parse_buffers
from actors.serving.contexts import context_params, stop_at
from actors.serving.draft import Text
from actors.serving.journal import LogLine
from actors.serving.load_errors import load_failed
from actors.serving.model import Row
from actors.serving.protocol import BufferSizes, LoadSpec
from actors.serving.speculator import GuessingContext, Speculator
from scheduler.costs.companions import mtp_context

_CONTEXT_TYPE_MTP = 1  # LLAMA_CONTEXT_TYPE_MTP, llama.h


class PredictionLayers(GuessingContext):
    """Those of a loaded model, in a context. `close()` frees it, before the model's own."""

    shares_weights = True  # with the model

    def __init__(
        self, spec: LoadSpec, model: Any, target: Any, buffer_names: Sequence[str], lines: list[LogLine]
    ) -> None:
        """`model`, `target`: the `llama_model *`, loaded with `load_mtp`, and its `llama_context *`. Raises
        LoadFailed."""
        self._n_max = self.least_steps = spec.draft.n_max
        self._p_min = spec.draft.p_min
        self._n_embd = llama_cpp.llama_model_n_embd(model)
        self._next = [-1] * spec.context.n_seq_max  # the position that is read next; -1: any
        self.rests = False
        self.followed_s = 0.0
        began = len(lines)
        params = context_params(mtp_context(spec.context), spec.n_threads)
        params.ctx_type = _CONTEXT_TYPE_MTP
        params.ctx_other = target
        self.context = llama_cpp.llama_init_from_model(model, params)
        if not self.context:
            raise load_failed("llama.cpp could not make a context for the prediction layers", lines)
        told = (line.text for line in lines[began:])
        self.buffers: BufferSizes = parse_buffers(told, buffer_names, llama_cpp.llama_n_ctx_seq(self.context))

    def guess_for(self, target: Any, abort_flag: Any) -> None:
        """They guess for the model's own context. Raises LoadFailed."""
        stop_at(self.context, abort_flag)
        self._speculator = Speculator(target, self.context, "draft-mtp", self._n_max, self._p_min, len(self._next))
        # From now on the model keeps activations of every token. Its graph is reserved anew with the next decode, or
        # its buffers would grow later, when somebody has a long prompt. llama.cpp does so after any control vector was
        # set, and this is none.
        llama_cpp.llama_set_adapter_cvec(target, None, 0, self._n_embd, 0, 0)

    def warm_up(self) -> None:
        """They followed the model's own warm-up."""
        for sequence in range(len(self._next)):
            self.forget(sequence, 0)

    # A `Guesser` (the owning thread)

    def can_guess(self, text: Text) -> bool:
        return self._next[text.sequence] == len(text.tokens) - 1

    def unread(self, text: Text) -> int:
        """They have read all, or never will."""
        return 0

    def guess(self, wanted: Mapping[Text, int]) -> None:
        for text in wanted:
            text.ready = []
        if self._speculator is None or not wanted:
            return
        asked = [(text.sequence, text.tokens[-1], len(text.tokens) - 1, most) for text, most in wanted.items()]
        for text, guessed in zip(wanted, self._speculator.guess(asked), strict=True):
            text.ready = guessed
            self._remove(text.sequence, len(text.tokens) - 1)

    def follow(self, rows: Sequence[Row]) -> None:
        self.followed_s = 0.0
        if self._speculator is None or self.rests:
            return
        began = time.perf_counter()
        known = [*self._next]
        for row in rows:
            if row.position != known[row.sequence]:
                self._remove(row.sequence, row.position if row.position < known[row.sequence] else 0)
            known[row.sequence] = row.position + 1
        tokens, positions, sequences, _ = zip(*rows, strict=True)
        if self._speculator.read(tokens, positions, sequences):
            self._next = known
        else:
            for sequence in set(sequences):
                self._remove(sequence, 0)
                self._next[sequence] = -1
        self.followed_s = time.perf_counter() - began

    def judge(self, sequence: int, n_right: int) -> None:
        if self._speculator is not None and not self.rests:
            self._speculator.accept(sequence, n_right)

    def forget(self, sequence: int, kept: int) -> None:
        if self._next[sequence] > kept or not kept:
            self._remove(sequence, kept)
            self._next[sequence] = kept or -1

    def copy(self, source: int, sequence: int, count: int) -> None:
        self.forget(sequence, 0)
        if self._next[source] >= count:
            llama_cpp.llama_memory_seq_cp(llama_cpp.llama_get_memory(self.context), source, sequence, 0, count)
            self._next[sequence] = count

    def _remove(self, sequence: int, kept: int) -> None:
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.context), sequence, kept, -1)
