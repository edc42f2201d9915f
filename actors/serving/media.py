"""A model's projector (mmproj) in libmtmd: pictures and sounds into what the model reads.

A medium is *encoded* by the projector, in any one thread at a time, and then *decoded* by the model, piece by piece, in
the thread that owns its context. A file may be several media with text between them: tiles of a picture, half minutes
of a sound. No text of strangers comes here, and no file: only pixels and samples (see `media_files`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from threading import Thread
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import mtmd_cpp

from actors.serving.dialogue import SIZE, Senses
from actors.serving.journal import llama_log
from actors.serving.load_errors import load_failed
from actors.serving.pieces import Medium, Piece
from actors.serving.protocol import LoadFailed, LoadSpec
from scheduler.costs.projector import read_projector
from scheduler.errors import ArrieroError, EngineFailed, InvalidGGUF, Rejected

_DEPEND_ON_OTHERS = {"deepseek4v", "hunyuanvl"}
"""Kinds of projectors whose pictures depend on what is before them in the prompt. Here each is made alone."""


class Projector:
    """A loaded one; `close()` frees it. Raises LoadFailed. Media may be made by any thread."""

    def __init__(self, spec: LoadSpec, model: Any, device: int | None, n_ubatch: int) -> None:
        """`model`: the `llama_model *`; `device`: where it lies; None: in host RAM."""
        self._n_ubatch = n_ubatch
        self._n_embd: int = llama_cpp.llama_model_n_embd_inp(model)
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu = device is not None
        params.device = device
        params.print_timings = False
        params.n_threads = spec.n_threads
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if spec.context.flash_attn == "on"
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.warmup = True  # which allocates its buffers
        try:
            projector = read_projector(spec.mmproj)
        except (InvalidGGUF, OSError) as error:
            raise LoadFailed("failed", f"llama.cpp could not load the projector {spec.mmproj}: {error}") from error
        eyes = [encoder for encoder in projector.encoders if not encoder.is_audio]
        self._kinds = {encoder.kind for encoder in eyes}
        usual = max((encoder.most_tokens for encoder in eyes), default=0)
        if most := spec.context.image_max_tokens or usual:
            params.image_max_tokens = most  # larger images would need larger buffers than were booked: they are shrunk
        if least := spec.context.image_min_tokens:
            params.image_min_tokens = least
        # libmtmd shrinks no picture of these: larger ones are refused.
        self._most_tokens = 0 if all(encoder.is_choosable for encoder in eyes) else usual
        with llama_log().recording() as lines:
            mtmd_cpp.mtmd_helper_log_set(llama_log().callback, ctypes.c_void_p(0))
            # OpenMP keeps a team of threads for every thread that has computed, as long as that lives.
            made: list[Any] = []
            path = spec.mmproj.encode()
            loading = Thread(target=lambda: made.append(mtmd_cpp.mtmd_init_from_file(path, model, params)))
            loading.start()
            loading.join()
            self._context: Any = made[0] if made else None
            if not self._context:
                raise load_failed(f"llama.cpp could not load the projector {spec.mmproj}", lines)
        self._has_mrope = bool(mtmd_cpp.mtmd_decode_use_mrope(self._context))
        self._marker: bytes = mtmd_cpp.mtmd_default_marker()
        if most > usual:
            self._warm_up(max(encoder.taking(most).side_pixels for encoder in eyes))
        rate = mtmd_cpp.mtmd_get_audio_sample_rate(self._context)
        self.senses = Senses(bool(mtmd_cpp.mtmd_support_vision(self._context)), max(0, rate))

    def _warm_up(self, side: int) -> None:
        """Encodes the largest picture, so that its buffers are taken now, and not when memory is used by others."""
        failures: list[str] = []

        def encode() -> None:
            try:
                for part in self.picture(side, side, bytes(3 * side * side)):
                    if isinstance(part, Medium):
                        self.encode(part)
            except ArrieroError as error:
                failures.append(error.message)

        encoding = Thread(target=encode)
        encoding.start()
        encoding.join()
        if failures:
            self.close()
            raise LoadFailed(
                "failed", f"the projector cannot encode a picture of {side} x {side} pixels: {failures[0]}"
            )

    def close(self) -> None:
        """Safe to call twice."""
        if self._context:
            mtmd_cpp.mtmd_free(self._context)
        self._context = None

    # ------------------------------------------------------------------ any thread

    def picture(self, width: int, height: int, pixels: bytes) -> Sequence[list[int] | Medium]:
        """What a picture is to the model; `pixels`: red, green and blue, a byte each. Raises Rejected."""
        if len(pixels) != 3 * width * height or not pixels:
            raise EngineFailed(f"a picture of {width} x {height} pixels came with {len(pixels)} bytes")
        if unable := self._kinds & _DEPEND_ON_OTHERS:
            raise Rejected(f"pictures are not supported for projectors of kind {unable.pop()}; send text only")
        data: Any = ctypes.cast(ctypes.c_char_p(pixels), ctypes.POINTER(ctypes.c_uint8))
        identity = blake2b(b"picture" + SIZE.pack(width, height) + pixels, digest_size=16).digest()
        return self._parts_of(mtmd_cpp.mtmd_bitmap_init(width, height, data), identity)

    def sound(self, samples: bytes) -> Sequence[list[int] | Medium]:
        """What a sound is to the model; `samples`: floats of 4 bytes. Raises Rejected."""
        data: Any = ctypes.cast(ctypes.c_char_p(samples), ctypes.POINTER(ctypes.c_float))
        identity = blake2b(b"sound" + samples, digest_size=16).digest()
        return self._parts_of(mtmd_cpp.mtmd_bitmap_init_from_audio(len(samples) // 4, data), identity)

    def _parts_of(self, bitmap: Any, identity: bytes) -> Sequence[list[int] | Medium]:
        """Frees the bitmap."""
        chunks: Any = mtmd_cpp.mtmd_input_chunks_init()
        try:
            text: Any = ctypes.byref(mtmd_cpp.mtmd_input_text(self._marker, len(self._marker), False, True))
            bitmaps: Any = (ctypes.c_void_p * 1)(bitmap)
            code = mtmd_cpp.mtmd_tokenize(self._context, chunks, text, bitmaps, 1)
            if code != 0:
                raise Rejected(f"this model's projector refuses this picture or sound (mtmd_tokenize returned {code})")
            return list(self._parts(chunks, identity))
        finally:
            mtmd_cpp.mtmd_input_chunks_free(chunks)
            mtmd_cpp.mtmd_bitmap_free(bitmap)

    def _parts(self, chunks: Any, identity: bytes) -> Iterator[list[int] | Medium]:
        for index in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
            chunk: Any = mtmd_cpp.mtmd_input_chunks_get(chunks, index)
            n_tokens = mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk)
            kind = mtmd_cpp.mtmd_input_chunk_get_type(chunk)
            if kind == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_TEXT:
                count: Any = ctypes.byref(ctypes.c_size_t())
                tokens: Any = mtmd_cpp.mtmd_input_chunk_get_tokens_text(chunk, count)
                yield list(tokens[:n_tokens])
                continue
            at_once = bool(mtmd_cpp.mtmd_decode_use_non_causal(self._context, chunk))
            if at_once and n_tokens > self._n_ubatch:
                raise Rejected(  # llama.cpp would end the process
                    f"a picture is {n_tokens} tokens, which this model must read at once, but its n_ubatch is "
                    f"{self._n_ubatch}; set n_ubatch: {n_tokens} or more for it in the catalogue"
                )
            if not n_tokens:
                raise Rejected("a picture or sound is too small for this model's projector")
            is_image = mtmd_cpp.mtmd_input_chunk_get_type(chunk) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE
            if is_image and 0 < self._most_tokens < n_tokens:
                raise Rejected(
                    f"a picture is {n_tokens} tokens; this model's projector takes at most {self._most_tokens}. "
                    "Make the picture smaller"
                )
            positions = mtmd_cpp.mtmd_input_chunk_get_n_pos(chunk)
            is_sound = kind == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_AUDIO
            yield Medium(
                identity + b"%d" % index, n_tokens, positions, _Chunk(chunk), at_once=at_once, is_sound=is_sound
            )

    # ------------------------------------------------------------------ one thread at a time

    def encode(self, medium: Medium) -> None:
        """Computes its embedding. Raises EngineFailed."""
        if mtmd_cpp.mtmd_encode_chunk(self._context, medium.chunk.pointer) != 0:
            raise EngineFailed(f"the projector failed: {llama_log().last_errors() or 'no reason given'}")
        embedding: Any = mtmd_cpp.mtmd_get_output_embd(self._context)
        vectors = np.array(np.ctypeslib.as_array(embedding, (medium.n_tokens, self._n_embd)))
        if not np.isfinite(vectors).all():  # in the cache, they would spoil the answers of others
            raise EngineFailed("the projector gave no result for a picture or sound")
        medium.embedding = vectors

    # ------------------------------------------------------------------ the thread that owns the context

    def decode(self, context: Any, pieces: Sequence[Piece]) -> int:
        """The model reads what was encoded: pieces of several media, or one that must be read at once. The code is
        llama_decode's."""
        count = sum(piece.end - piece.start for piece in pieces)
        vectors = np.concatenate([piece.medium.embedding[piece.start : piece.end] for piece in pieces])
        positions = np.ascontiguousarray(np.concatenate([self._positions(piece) for piece in pieces], axis=1))
        sequences = np.array([piece.sequence for piece in pieces for _ in range(piece.start, piece.end)], np.int32)
        addresses = sequences.ctypes.data + sequences.itemsize * np.arange(count, dtype=np.uint64)
        ones, zeros = np.ones(count, np.int32), np.zeros(count, np.int8)  # sequences of each row; no row is sampled
        batch = llama_cpp.llama_batch(
            n_tokens=count,
            embd=vectors.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            pos=positions.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_pos)),
            n_seq_id=ones.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=addresses.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(llama_cpp.llama_seq_id))),
            logits=zeros.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        if not pieces[0].medium.at_once:
            return int(llama_cpp.llama_decode(context, batch))
        llama_cpp.llama_set_causal_attn(context, False)
        try:
            return int(llama_cpp.llama_decode(context, batch))
        finally:
            llama_cpp.llama_set_causal_attn(context, True)

    def _positions(self, piece: Piece) -> npt.NDArray[np.int32]:
        """Of each of its tokens, in a column: one number, or, with M-RoPE, that of time, row, column, and one more."""
        told = np.zeros((4, piece.end - piece.start), np.int32)
        if self._has_mrope and not piece.medium.is_sound:
            places = (mtmd_cpp.mtmd_decoder_pos * piece.medium.n_tokens)()
            picture: Any = mtmd_cpp.mtmd_input_chunk_get_tokens_image(piece.medium.chunk.pointer)
            mtmd_cpp.mtmd_helper_image_get_decoder_pos(picture, piece.position, places)
            fields = np.frombuffer(places, np.uint32).reshape(-1, 4)  # t, x, y, z
            told[:] = fields[piece.start : piece.end, [0, 2, 1, 3]].T
        else:
            told[: 4 if self._has_mrope else 1] = piece.position + np.arange(piece.start, piece.end)
        return told


class _Chunk:
    """A copy of an `mtmd_input_chunk`, freed with the last who has it: several answers may read it."""

    def __init__(self, chunk: Any) -> None:
        self.pointer: Any = mtmd_cpp.mtmd_input_chunk_copy(chunk)
        self._free = mtmd_cpp.mtmd_input_chunk_free  # also at the interpreter's end

    def __del__(self) -> None:
        self._free(self.pointer)
