"""What libmtmd's own helper makes of a prompt with pictures: the whole prompt at once, on one sequence."""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp

from actors.serving.vocabulary import piece_of


def answer_of(model: Path, mmproj: Path, prompt: str, files: Sequence[bytes], n_tokens: int, *, n_ubatch: int) -> str:
    """The greedy answer; `prompt` has libmtmd's own marker for every file."""
    with ExitStack() as held:
        loaded: Any = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
        held.callback(llama_cpp.llama_model_free, loaded)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads = 1024, 512, n_ubatch, 2
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context: Any = llama_cpp.llama_init_from_model(loaded, params)
        held.callback(llama_cpp.llama_free, context)
        seeing = mtmd_cpp.mtmd_context_params_default()
        seeing.use_gpu, seeing.n_threads = False, 2
        seeing.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        eyes: Any = mtmd_cpp.mtmd_init_from_file(str(mmproj).encode(), loaded, seeing)
        held.callback(mtmd_cpp.mtmd_free, eyes)
        bitmaps: list[Any] = []
        for file in files:
            buffer: Any = (c.c_uint8 * len(file)).from_buffer_copy(file)
            bitmaps.append(mtmd_cpp.mtmd_helper_bitmap_init_from_buf(eyes, buffer, len(file), False))
            held.callback(mtmd_cpp.mtmd_bitmap_free, bitmaps[-1])
        raw = prompt.encode()
        text: Any = c.byref(mtmd_cpp.mtmd_input_text(raw, len(raw), True, True))
        chunks: Any = mtmd_cpp.mtmd_input_chunks_init()
        held.callback(mtmd_cpp.mtmd_input_chunks_free, chunks)
        all_bitmaps: Any = (c.c_void_p * len(bitmaps))(*bitmaps)
        assert mtmd_cpp.mtmd_tokenize(eyes, chunks, text, all_bitmaps, len(bitmaps)) == 0
        after = llama_cpp.llama_pos()
        assert mtmd_cpp.mtmd_helper_eval_chunks(eyes, context, chunks, 0, 0, 512, True, c.byref(after)) == 0
        return _go_on(loaded, context, after.value, n_tokens)


def _go_on(model: Any, context: Any, position: int, n_tokens: int) -> str:
    vocab = llama_cpp.llama_model_get_vocab(model)
    n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
    said = b""
    batch = llama_cpp.llama_batch_init(1, 0, 1)
    for _ in range(n_tokens):
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (n_vocab,))
        token = int(logits.argmax())
        said += piece_of(vocab, token, special=False)
        batch.token[0], batch.pos[0], batch.n_seq_id[0], batch.logits[0] = token, position, 1, 1
        batch.seq_id[0][0] = 0
        batch.n_tokens = 1
        assert llama_cpp.llama_decode(context, batch) == 0
        position += 1
    llama_cpp.llama_batch_free(batch)
    return said.decode()
