"""Contexts of llama.cpp: their parameters, and how a decode in one is stopped."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp

from actors.serving.ggml import cache_type
from scheduler.costs.params import ContextParams


def context_params(context: ContextParams, n_threads: int) -> Any:
    """`context` in llama.cpp's own structure. Raises LoadFailed for a type of the cache that is none."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = context.n_ctx
    params.n_seq_max = context.n_seq_max
    params.n_batch = context.n_batch
    params.n_ubatch = context.n_ubatch
    params.n_threads = params.n_threads_batch = n_threads
    params.type_k, params.type_v = cache_type(context.type_k), cache_type(context.type_v)
    params.flash_attn_type = (
        llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if context.flash_attn == "on"
        else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    params.kv_unified = context.kv_unified
    params.swa_full = context.swa_full
    params.embeddings = context.embeddings
    params.n_outputs_max = context.n_outputs_max
    params.n_rs_seq = context.n_rs_seq
    return params


def looks_ahead(model: Any) -> bool:
    """Whether the model's file says that tokens know later ones. Then a text must be in one batch."""
    value = ctypes.create_string_buffer(16)
    for key in (b"general.architecture", b"%s.attention.causal"):
        if llama_cpp.llama_model_meta_val_str(model, key.replace(b"%s", value.value), value, len(value)) < 0:
            return False
    return value.value == b"false"


def stop_at(context: Any, flag: Any) -> None:
    """Decodes of this context on the CPU stop while `flag` is no empty text.

    llama.cpp asks between graph nodes, thousands of times a second: a Python function would fight for the interpreter
    lock each time. strlen of the flag is 0 or 1, which is the bool that llama.cpp wants.
    """
    strlen = ctypes.cast(ctypes.CDLL(None).strlen, llama_cpp.ggml_abort_callback)
    llama_cpp.llama_set_abort_callback(context, strlen, ctypes.addressof(flag))
