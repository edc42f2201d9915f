"""A draft model: a smaller model with the same vocabulary, in a context of its own, that guesses next tokens.

It lies whole on the model's first device, or in host RAM, and has as many sequences and cells as the model. It reads
what it has not read of an answer when it is asked to guess: so it costs nothing where it is not asked. Of a long prompt
it reads one micro-batch in a turn, and guesses when it has read all. It keeps what it has read, and finds it again when
a chat goes on. What it holds is a matter of its own: it changes nothing of the model's cache, and nobody gives way to
it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any

import llama_cpp

from actors.serving.buffers import parse_buffers
from actors.serving.contexts import context_params, stop_at
from actors.serving.draft import Text
from actors.serving.journal import LogLine
from actors.serving.load_errors import load_failed
from actors.serving.model import Row
from actors.serving.protocol import BufferSizes, LoadFailed, LoadSpec
from actors.serving.slot import common_prefix
from actors.serving.speculator import GuessingContext, Speculator
from scheduler.costs.companions import draft_context


@dataclass(slots=True)
class _Held:
    """What a sequence of the draft's context holds. `owner`: whose text begins with its first `n_sure` tokens."""

    tokens: list[int] = field(default_factory=list)
    owner: Text | None = None
    n_sure: int = 0
    n_known: int = 0  # tokens of the owner's text before the first that the draft does not know

    def knows(self, text: Text, n_vocab: int) -> bool:
        """Whether all of `text` is in a vocabulary of `n_vocab` tokens."""
        self._belong_to(text)
        unseen = islice(text.tokens, self.n_known, None)
        self.n_known += sum(1 for _ in takewhile(lambda token: token < n_vocab, unseen))
        return self.n_known == len(text.tokens)

    def _belong_to(self, text: Text) -> None:
        if self.owner is not text:
            self.owner, self.n_sure, self.n_known = text, 0, 0

    def shared(self, text: Text) -> int:
        """How many tokens it holds of those before the last one of `text`."""
        self._belong_to(text)
        at = self.n_sure
        self.n_sure = at + common_prefix(self.tokens[at:], text.tokens[at:])
        return min(self.n_sure, len(text.tokens) - 1)


class DraftModel(GuessingContext):
    """A loaded one with its context. `close()` frees both, before the model that it guesses for."""

    shares_weights = False

    def __init__(
        self, spec: LoadSpec, device: int | None, buffer_names: Sequence[str], lines: list[LogLine], *, no_alloc: bool
    ) -> None:
        """`device`: ggml's, where it lies; None: host RAM. `buffer_names`: of all devices of the spec. Raises
        LoadFailed."""
        self._device = device
        self._spec = spec
        self._model: Any = None
        self.least_steps, self.rests, self.followed_s = 0, False, 0.0
        self._held = [_Held() for _ in range(spec.context.n_seq_max)]
        began = len(lines)
        try:
            self._load(spec, lines, no_alloc)
            params = context_params(draft_context(spec.context), spec.n_threads)
            self.context = llama_cpp.llama_init_from_model(self._model, params)
            if not self.context:
                raise load_failed("llama.cpp could not make a context for the draft model", lines)
        except BaseException:
            self.close()
            raise
        self._n_cells: int = llama_cpp.llama_n_ctx(self.context)
        self._n_ubatch: int = llama_cpp.llama_n_ubatch(self.context)
        told = (line.text for line in lines[began:])
        self.buffers: BufferSizes = parse_buffers(told, buffer_names, llama_cpp.llama_n_ctx_seq(self.context))

    def _load(self, spec: LoadSpec, lines: list[LogLine], no_alloc: bool) -> None:
        params = llama_cpp.llama_model_default_params()
        devices = (ctypes.c_void_p * 2)(self._device, None)
        params.devices = ctypes.cast(devices, ctypes.c_void_p)
        params.n_gpu_layers = 0 if self._device is None else -1
        params.split_mode = llama_cpp.LLAMA_SPLIT_MODE_LAYER
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP if spec.use_mmap else llama_cpp.LLAMA_LOAD_MODE_NONE
        params.use_extra_bufts = False
        if no_alloc:
            params.no_alloc, params.load_mode = True, llama_cpp.LLAMA_LOAD_MODE_NONE
        self._kept = params, devices  # the model goes on reading these for as long as it lives
        self._model = llama_cpp.llama_model_load_from_file(spec.draft.path.encode(), params)
        if not self._model:
            raise load_failed(f"llama.cpp could not load the draft model {spec.draft.path}", lines)

    def guess_for(self, context: Any, abort_flag: Any) -> None:
        """It guesses for the model of this `llama_context *`. `abort_flag`: see `stop_at`. Raises LoadFailed where
        their vocabularies differ."""
        stop_at(self.context, abort_flag)
        draft = self._spec.draft
        # llama.cpp takes a draft that has up to 128 tokens more or less than the model. To read one that they do not
        # have fails the model's batch, and ends the process of the draft.
        self._n_vocab = min(_vocabulary_size(llama_cpp.llama_get_model(context)), _vocabulary_size(self._model))
        try:
            self._speculator = Speculator(
                context, self.context, "draft-simple", draft.n_max, draft.p_min, len(self._held)
            )
        except LoadFailed as error:
            raise LoadFailed(
                "failed",
                f"{draft.path} cannot guess for {self._spec.model}: {error}. Name a model with the same vocabulary in "
                "model_draft, or leave it out",
            ) from None

    def warm_up(self) -> None:
        """It reads a token, so that the first guess meets loaded pages."""
        if self._speculator is not None:
            self._speculator.read([0], [0], [0])
            self._cut(0, 0, certainly=True)

    def close(self) -> None:
        super().close()
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._model = None

    # A `Guesser` (the owning thread)

    def can_guess(self, text: Text) -> bool:
        return self._held[text.sequence].knows(text, self._n_vocab)

    def unread(self, text: Text) -> int:
        return len(text.tokens) - 1 - self._held[text.sequence].shared(text)

    def guess(self, wanted: Mapping[Text, int]) -> None:
        for text in wanted:
            text.ready = []
            held = self._held[text.sequence]
            self._cut(text.sequence, held.shared(text))
        self._make_room(wanted)
        self._read(wanted)
        ready = [(text, most) for text, most in wanted.items() if not self.unread(text)]
        if not ready or self._speculator is None:
            return
        asked = [(text.sequence, text.tokens[-1], len(text.tokens) - 1, most) for text, most in ready]
        for (text, _), guessed in zip(ready, self._speculator.guess(asked), strict=True):
            text.ready = [*takewhile(lambda token: token < self._n_vocab, guessed)]
            held = self._held[text.sequence]
            if guessed:
                held.tokens += [text.tokens[-1], *guessed[:-1]]
            self._cut(text.sequence, len(held.tokens), certainly=True)  # it may have read one more, or not

    def follow(self, rows: Sequence[Row]) -> None:
        """It reads when it is asked to guess."""

    def judge(self, sequence: int, n_right: int) -> None:
        """It sees in the text what was right."""

    def forget(self, sequence: int, kept: int) -> None:
        """What it holds is a matter of its own."""

    def copy(self, source: int, sequence: int, count: int) -> None:
        """Likewise."""

    def _read(self, wanted: Mapping[Text, int]) -> None:
        """What comes before the last tokens of these texts, in one micro-batch at the most."""
        tokens: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        for text in wanted:
            start, room = len(self._held[text.sequence].tokens), self._n_ubatch - len(tokens)
            more = text.tokens[start : min(start + room, len(text.tokens) - 1)]
            tokens += more
            positions += range(start, start + len(more))
            sequences += [text.sequence] * len(more)
        if not tokens or self._speculator is None:
            return
        if not self._speculator.read(tokens, positions, sequences):
            for sequence in set(sequences):
                self._cut(sequence, 0)
            return
        for token, sequence in zip(tokens, sequences, strict=True):
            self._held[sequence].tokens.append(token)

    def _make_room(self, wanted: Mapping[Text, int]) -> None:
        """Sequences that nobody asks for give way, where all share the cells."""
        needed = sum(len(text.tokens) + most for text, most in wanted.items())
        asked = {text.sequence for text in wanted}
        others = [sequence for sequence, held in enumerate(self._held) if held.tokens and sequence not in asked]
        if (
            self._spec.context.kv_unified
            and needed + sum(len(self._held[each].tokens) for each in others) > self._n_cells
        ):
            for sequence in others:
                self._cut(sequence, 0)

    def _cut(self, sequence: int, kept: int, *, certainly: bool = False) -> None:
        """It holds no more than so many tokens of `sequence`."""
        held = self._held[sequence]
        if kept < len(held.tokens) or certainly:
            llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.context), sequence, kept or -1, -1)
            del held.tokens[kept:]
            held.n_sure = min(held.n_sure, kept)


def _vocabulary_size(model: Any) -> int:
    """In tokens, of a `llama_model *`."""
    return int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)))
