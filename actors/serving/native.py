"""One model and its context in llama.cpp, behind a dozen plain calls. Free of Ray and of policy; not thread-safe.

`NativeModel` loads exactly what a `LoadSpec` says: explicit devices, layer split and context, so that llama.cpp's own
fitting has nothing to decide. Afterwards it decodes batches of rows, samples, embeds and forgets. All calls but
`abort` and the vocabulary ones belong to the thread that owns the context.
A load makes llama.cpp look for devices, and the CUDA library read CUDA_VISIBLE_DEVICES: `show_only` comes first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp._internals import LlamaBatch

from actors.serving.breakdown import checked_breakdown, without_weights
from actors.serving.buffers import footprint_of, parse_buffers, reserved_anew
from actors.serving.contexts import context_params, looks_ahead, stop_at
from actors.serving.ggml import BufferOverride, find_devices, ggml_function
from actors.serving.journal import LogLine, llama_log
from actors.serving.load_errors import load_failed
from actors.serving.model import Adapters, Row
from actors.serving.pieces import Medium, Piece
from actors.serving.protocol import BufferSizes, LoadFailed, LoadSpec, Sampling
from actors.serving.sampling import Chain, build_sampler
from actors.serving.sequences import Sequences
from actors.serving.vocabulary import piece_of
from scheduler.costs.params import ContextParams, Footprint

if TYPE_CHECKING:
    from actors.serving.draft_model import DraftModel
    from actors.serving.media import Projector
    from actors.serving.prediction import PredictionLayers

_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data (llama.h)


class NativeModel(Sequences):
    """A loaded model with its context. `close()` frees both; a failed load raises LoadFailed and leaves nothing."""

    def __init__(
        self,
        spec: LoadSpec,
        rpc_endpoints: Sequence[str],
        on_progress: Callable[[float], object],
        *,
        no_alloc: bool = False,
    ) -> None:
        """`no_alloc`: nothing is loaded, and all that can be asked is the `breakdown`."""
        self._no_alloc = no_alloc
        self._model: Any = None
        self._context: Any = None
        self._loras: list[Any] = []
        self._adapters: Adapters = ()  # that the context applies
        self._batch: LlamaBatch | None = None
        self._kept: tuple[object, ...] = ()
        self._unified = self.shares_stream = spec.context.kv_unified
        self._n_copies, self._revocable = spec.context.n_rs_seq, {}
        self.eyes: Projector | None = None
        self.guesser: DraftModel | PredictionLayers | None = None
        self.most_drafted = spec.draft.n_max
        self._spec_type = spec.context.spec_type
        self._abort_flag = ctypes.create_string_buffer(b"", 2)
        log = llama_log()
        with log.recording() as lines:
            try:
                llama_cpp.llama_backend_init()
                device_buffers = self._load(spec, rpc_endpoints, on_progress, lines)
                self._load_adapters(spec, lines)
                self._make_context(spec.context, spec.n_threads, lines)
                self.n_ctx_per_slot: int = llama_cpp.llama_n_ctx_seq(self._context)
                self.n_cells: int = llama_cpp.llama_n_ctx(self._context)
                self._device_buffers = device_buffers
                self._buffers = parse_buffers((line.text for line in lines), device_buffers, self.n_ctx_per_slot)
                self._read_facts(spec.context)
                if spec.context.spec_type in ("draft-simple", "draft-mtp"):
                    self._make_guesser(spec, device_buffers, lines)
                if spec.mmproj and not no_alloc:
                    self.eyes = self._projector(spec)
            except BaseException:
                self.close()
                raise

    # Loading

    def _load(
        self,
        spec: LoadSpec,
        rpc_endpoints: Sequence[str],
        on_progress: Callable[[float], object],
        lines: list[LogLine],
    ) -> list[str]:
        """Loads the weights; returns the name of each device's buffers as llama.cpp logs them."""
        devices, device_buffers = find_devices(spec, rpc_endpoints)
        self._devices = devices
        if len(spec.tensor_split) not in ({len(devices)} if len(devices) > 1 else {0, len(devices)}):
            raise LoadFailed("failed", f"tensor_split has {len(spec.tensor_split)} shares for {len(devices)} devices")
        params = llama_cpp.llama_model_default_params()
        device_array = (ctypes.c_void_p * (len(devices) + 1))(*devices, None)
        split = (ctypes.c_float * llama_cpp.llama_max_devices())(*(spec.tensor_split or (1.0,)))
        params.devices = ctypes.cast(device_array, ctypes.c_void_p)
        params.n_gpu_layers = spec.n_gpu_layers if devices else 0
        params.split_mode = llama_cpp.LLAMA_SPLIT_MODE_LAYER
        params.tensor_split = split
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP if spec.use_mmap else llama_cpp.LLAMA_LOAD_MODE_NONE
        params.use_extra_bufts = spec.use_extra_bufts
        params.load_mtp = spec.context.spec_type == "draft-mtp"
        if self._no_alloc:
            params.no_alloc, params.load_mode = True, llama_cpp.LLAMA_LOAD_MODE_NONE
        overrides = (BufferOverride * 2)()
        if spec.experts_pattern:
            overrides[0].pattern = spec.experts_pattern.encode()
            overrides[0].buffer_type = ggml_function("ggml_backend_cpu_buffer_type", ctypes.c_void_p)()
            params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
        interrupted: list[BaseException] = []

        def report(progress: float, _user_data: object) -> bool:
            try:
                on_progress(progress)
            except BaseException as error:  # an exception cannot cross C: stop the load and raise it afterwards
                interrupted.append(error)
            return not interrupted

        params.progress_callback = llama_cpp.llama_progress_callback(report)
        self._kept = params, device_array, split, overrides  # the model goes on reading these for as long as it lives
        self._model = llama_cpp.llama_model_load_from_file(spec.path.encode(), params)
        if interrupted:
            raise interrupted[0]
        if not self._model:
            raise load_failed(f"llama.cpp could not load {spec.path}", lines)
        return device_buffers

    def _load_adapters(self, spec: LoadSpec, lines: list[LogLine]) -> None:
        """Beside the weights that they belong to. None of them is applied yet."""
        for adapter in spec.adapters:
            lora = llama_cpp.llama_adapter_lora_init(self._model, adapter.path.encode())
            if not lora:
                raise load_failed(f"llama.cpp could not load the adapter {adapter.name}, {adapter.path}", lines)
            self._loras.append(lora)

    def _make_context(self, context: ContextParams, n_threads: int, lines: list[LogLine]) -> None:
        if context.n_seq_max > context.n_batch:  # llama.cpp would end the process over it
            raise LoadFailed("failed", f"n_batch is {context.n_batch}; {context.n_seq_max} sequences need as many rows")
        self._context = llama_cpp.llama_init_from_model(self._model, context_params(context, n_threads))
        if not self._context:
            raise load_failed("llama.cpp could not make a context", lines)
        n_copies = getattr(llama_cpp, "llama_n_rs_seq", lambda context: 0)(self._context)
        if n_copies != context.n_rs_seq:  # older releases keep none, and do not say so
            raise LoadFailed(
                "failed",
                f"this llama.cpp has {n_copies} copies of the model's recurrent states instead of {context.n_rs_seq}, "
                "so wrong guesses cannot be taken back: leave out model_draft and spec_type, or run make setup",
            )
        stop_at(self._context, self._abort_flag)

    def _make_guesser(self, spec: LoadSpec, device_buffers: Sequence[str], lines: list[LogLine]) -> None:
        from actors.serving.draft_model import DraftModel  # most models have none
        from actors.serving.prediction import PredictionLayers

        if spec.context.spec_type == "draft-mtp":
            self.guesser = PredictionLayers(spec, self._model, self._context, device_buffers, lines)
        else:
            device = self._devices[0] if spec.draft.on_device and self._devices else None
            self.guesser = DraftModel(spec, device, device_buffers, lines, no_alloc=self._no_alloc)
        if not self._no_alloc:
            self.guesser.guess_for(self._context, self._abort_flag)

    def _read_facts(self, context: ContextParams) -> None:
        self.vocab: Any = llama_cpp.llama_model_get_vocab(self._model)
        self.bos: int = llama_cpp.llama_vocab_bos(self.vocab)
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.n_seq_max: int = llama_cpp.llama_n_seq_max(self._context)
        self.n_batch: int = llama_cpp.llama_n_batch(self._context)
        self.n_ubatch: int = llama_cpp.llama_n_ubatch(self._context)
        self.n_embd: int = llama_cpp.llama_model_n_embd_out(self._model)
        self._memory: Any = llama_cpp.llama_get_memory(self._context)
        self._window: int = 0 if context.swa_full else llama_cpp.llama_model_n_swa(self._model)
        self.n_outputs: int = context.n_outputs_max or self.n_batch
        has_states = llama_cpp.llama_model_is_recurrent(self._model) or llama_cpp.llama_model_is_hybrid(self._model)
        self.keeps_states: bool = bool(has_states or self._window)
        self.copies_states: bool = bool(self._n_copies and not self._window)
        self.shares_cells: bool = self._unified and bool(self._memory) and not self._window and not has_states
        pooling = llama_cpp.llama_pooling_type(self._context)
        self.is_pooled: bool = pooling != llama_cpp.LLAMA_POOLING_TYPE_NONE
        self.reads_whole: bool = not self._memory or looks_ahead(self._model)
        self.is_reranker: bool = pooling == llama_cpp.LLAMA_POOLING_TYPE_RANK
        if self.is_reranker:
            self.n_embd = llama_cpp.llama_model_n_cls_out(self._model)
        self.can_generate: bool = bool(self._memory) and pooling == llama_cpp.LLAMA_POOLING_TYPE_NONE
        self._batch = LlamaBatch(n_tokens=self.n_batch, embd=0, n_seq_max=1, verbose=False)
        # Embeddings are computed only in the turns that want them: they make every token of a batch an output.
        llama_cpp.llama_set_embeddings(self._context, False)

    def _projector(self, spec: LoadSpec) -> Projector:
        from actors.serving.media import Projector  # most models have none

        device = self._devices[0] if spec.mmproj_on_device and self._devices else None
        return Projector(spec, self._model, device, self.n_ubatch)

    @property
    def buffers(self) -> BufferSizes:
        """What llama.cpp allocated, in its own words: for the model and its draft."""
        if self.guesser is None:
            return self._buffers
        both = footprint_of(self._buffers) + footprint_of(self.guesser.buffers)
        return replace(self._buffers, devices=both.devices, host=both.host)

    def breakdown(self) -> Footprint | None:
        """llama.cpp's own sums, to the byte; None where it cannot be asked, or its log says otherwise."""
        sums = checked_breakdown(self._context, self._devices, self._buffers)
        if self.guesser is None:
            return sums
        theirs = checked_breakdown(self.guesser.context, self._devices, self.guesser.buffers)
        if sums is None or theirs is None:
            return None
        return sums + (without_weights(theirs) if self.guesser.shares_weights else theirs)

    def close(self) -> None:
        """Frees the context, the model and its projector; safe to call twice."""
        if self.eyes is not None:
            self.eyes.close()
        if self.guesser is not None:
            self.guesser.close()
        if self._batch is not None:
            self._batch.close()
        if self._context:
            llama_cpp.llama_free(self._context)
        for lora in self._loras:
            llama_cpp.llama_adapter_lora_free(lora)
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._batch = self._context = self._model = None
        self._loras = []

    # Vocabulary (any thread)

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """See `piece_of`."""
        return piece_of(self.vocab, token, special=special)

    def ends_generation(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))

    @cached_property
    def _ends(self) -> Sequence[int]:
        """Every token that ends an answer. 160 ms for 150,000 tokens, once."""
        return [token for token in range(self.n_vocab) if self.ends_generation(token)]

    def sampler(self, sampling: Sampling, prompt: Sequence[int]) -> Chain:
        """A new sampler chain for an answer to `prompt`; the caller closes it. Raises Rejected for settings that cannot
        be."""
        ends = self._ends if sampling.ignore_eos or sampling.min_tokens else ()
        text = [token for token in prompt if token >= 0] if self.eyes is not None else prompt
        return build_sampler(self.vocab, self.n_ctx_per_slot, sampling, text, ends)

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` spell, without the token that begins every text."""
        spelled = tokens[1:] if tokens[:1] == [self.bos] else tokens
        return b"".join(self.piece(token, special=True) for token in spelled).decode(errors="replace")

    # Computing (the owning thread)

    def warm_up(self) -> None:
        """One decode, so that the first request meets loaded pages and kernels, and a device that cannot compute
        fails the load (LoadFailed) instead of a request. What only embeds is warmed up by an embedding.

        It is done with all adapters: then the compute buffers are as large as they will ever be, and `buffers` says so.
        """
        rows = [Row(max(0, self.bos), 0, 0, True)]
        with llama_log().recording() as lines:
            self.use_adapters(tuple((index, 1.0) for index in range(len(self._loras))))
            llama_cpp.llama_set_warmup(self._context, True)
            code = self.decode(rows) if self.can_generate else self.embed(rows)
            llama_cpp.llama_set_warmup(self._context, False)
            if isinstance(code, int) and code != 0:
                raise load_failed(f"the first decode failed (llama_decode returned {code})", lines)
            llama_cpp.llama_synchronize(self._context)
            self._decoded(())
            if self._memory:
                llama_cpp.llama_memory_clear(self._memory, True)
        if self._loras or self._spec_type == "draft-mtp":  # the graph was reserved anew
            self._buffers = reserved_anew(self._buffers, (line.text for line in lines), self._device_buffers)
        if self.guesser is not None:
            self.guesser.warm_up()

    def use_adapters(self, adapters: Adapters) -> None:
        """What is computed from now on is computed with these, by their places in the spec. After a change llama.cpp
        reserves its graph anew, in the next decode."""
        if adapters == self._adapters:
            return
        loras = (llama_cpp.llama_adapter_lora_p_ctypes * len(adapters))(*(self._loras[index] for index, _ in adapters))
        scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in adapters))
        llama_cpp.llama_set_adapters_lora(self._context, loras, len(adapters), scales)
        self._adapters = adapters

    def decode(self, rows: Sequence[Row]) -> int:
        """Runs `rows` through the model, to the end: devices compute asynchronously. 0: done; 1: no room in the cache,
        nothing changed; 2: aborted; else failed."""
        assert self._batch is not None
        batch = self._batch.batch
        token, position, sequence, counts, logits = batch.token, batch.pos, batch.seq_id, batch.n_seq_id, batch.logits
        for index, row in enumerate(rows):
            token[index], position[index] = row.token, row.position
            counts[index], sequence[index][0] = 1, row.sequence
            logits[index] = row.wants_logits
        batch.n_tokens = len(rows)
        code = int(llama_cpp.llama_decode(self._context, batch))
        self._decoded(rows if code == 0 else ())
        if code == 0:  # how long it took is measured, and prices go by that
            llama_cpp.llama_synchronize(self._context)
            if self.guesser is not None:
                self.guesser.follow(rows)
        return code

    def encode(self, medium: Medium) -> None:
        """The projector computes what `decode_media` needs. In any thread, one at a time. Raises EngineFailed."""
        assert self.eyes is not None
        self.eyes.encode(medium)

    def decode_media(self, pieces: Sequence[Piece]) -> int:
        """Runs pieces of encoded pictures and sounds through the model, or one that must be read at once, and nothing
        with it. The code is that of `decode`."""
        assert self.eyes is not None
        code = self.eyes.decode(self._context, pieces)
        self._decoded(())
        if code == 0:
            llama_cpp.llama_synchronize(self._context)
        return code

    def sample(self, sampler: Chain, row: int) -> int:
        """The next token after row `row` of the last batch; the sampler remembers it."""
        return int(llama_cpp.llama_sampler_sample(sampler.sampler, self._context, row))

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """A copy of what row `row` of the last batch says of every token."""
        return np.array(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, row), (self.n_vocab,)))

    # Choosing under a constraint (any thread, one at a time for each sampler)

    def pick(self, sampler: Chain, logits: npt.NDArray[np.float32], allowed: npt.NDArray[np.bool_] | None) -> int:
        """The token that the sampler picks by `logits`, among those `allowed` (one flag per token; None: all). The
        sampler does not remember it yet."""
        tokens = np.arange(self.n_vocab) if allowed is None else np.flatnonzero(allowed[: self.n_vocab])
        candidates = np.zeros(len(tokens), _TOKEN_DATA)
        candidates["id"], candidates["logit"] = tokens, logits[tokens]
        data = candidates.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
        array = llama_cpp.llama_token_data_array(data=data, size=len(tokens), selected=-1, sorted=False)
        llama_cpp.llama_sampler_apply(sampler.sampler, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def accept(self, sampler: Chain, token: int) -> None:
        """The sampler remembers a token that was picked."""
        sampler.accept([token])

    def embed(self, rows: Sequence[Row]) -> npt.NDArray[np.float32] | int:
        """Embeddings of `rows`: one vector per row, or, pooled, one per sequence in the order in which they come.

        An int is decode's code.
        """
        llama_cpp.llama_set_embeddings(self._context, True)
        try:
            code = self.decode([row._replace(wants_logits=True) for row in rows])
            self._decoded(())  # where all rows are outputs, llama.cpp divides them otherwise
            if code != 0:
                return code
            if self.is_pooled:
                sequences = dict.fromkeys(row.sequence for row in rows)
                vectors = [llama_cpp.llama_get_embeddings_seq(self._context, sequence) for sequence in sequences]
                return np.array([np.ctypeslib.as_array(vector, (self.n_embd,)) for vector in vectors])
            vectors = llama_cpp.llama_get_embeddings(self._context)
            return np.array(np.ctypeslib.as_array(vectors, (len(rows), self.n_embd)))
        finally:
            llama_cpp.llama_set_embeddings(self._context, False)

    def set_threads(self, n_threads: int) -> None:
        llama_cpp.llama_set_n_threads(self._context, n_threads, n_threads)
        if self.guesser is not None:
            self.guesser.set_threads(n_threads)

    def abort(self, wanted: bool) -> None:
        """Makes a decode under way on the CPU stop at its next graph node (any thread); False takes that back."""
        self._abort_flag[0] = b"1" if wanted else b"\0"
