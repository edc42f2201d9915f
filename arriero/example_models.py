"""Headers of models with the shapes of well-known sizes, for simulations on a machine that has no models.

A header says all that a plan needs; the files have no data, only its length, and take a few MiB of disk.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quant_shape_to_byte_shape

_QUANTIZED = GGMLQuantizationType.Q4_K


class Dimensions(NamedTuple):
    """What decides on a model's memory; `n_expert` 0: it is dense."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    n_expert: int = 0
    n_expert_used: int = 0


EXAMPLES = {
    "chat-1b": Dimensions(16, 2048, 32, 8, 8192, 128256),
    "chat-3b": Dimensions(28, 3072, 24, 8, 8192, 128256),
    "chat-8b": Dimensions(32, 4096, 32, 8, 14336, 128256),
    "code-7b": Dimensions(32, 4096, 32, 8, 14336, 32768),
    "code-14b": Dimensions(48, 5120, 40, 8, 13824, 152064),
    "moe-30b": Dimensions(48, 2048, 32, 4, 768, 151936, 128, 8),
    "chat-32b": Dimensions(64, 5120, 64, 8, 25600, 151936),
    "chat-70b": Dimensions(80, 8192, 64, 8, 28672, 128256),
}


def write_example_model(path: Path, name: str, of: Dimensions) -> Path:
    """A GGUF file of `of`'s shape in Q4_K, without data."""
    writer = GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_context_length(32768)
    writer.add_embedding_length(of.n_embd)
    writer.add_block_count(of.n_layer)
    writer.add_feed_forward_length(of.n_ff)
    writer.add_head_count(of.n_head)
    writer.add_head_count_kv(of.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(of.n_vocab)
    if of.n_expert:
        writer.add_expert_count(of.n_expert)
        writer.add_expert_used_count(of.n_expert_used)
    data_bytes = 0
    for tensor, shape in _tensors(of).items():
        if len(shape) == 1:
            n_bytes = 4 * shape[0]
            writer.add_tensor_info(tensor, shape, np.dtype(np.float32), n_bytes)
        else:
            rows = quant_shape_to_byte_shape(shape, _QUANTIZED)
            n_bytes = prod(rows)
            writer.add_tensor_info(tensor, rows, np.dtype(np.uint8), n_bytes, _QUANTIZED)
        data_bytes += -(-n_bytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + data_bytes)
    return path


def _tensors(of: Dimensions) -> dict[str, tuple[int, ...]]:
    """Shapes by name, rows last."""
    n, kv = of.n_embd, of.n_embd // of.n_head * of.n_head_kv
    tensors: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (of.n_vocab, n), "output_norm.weight": (n,), "output.weight": (of.n_vocab, n)
    }  # fmt: skip
    for il in range(of.n_layer):
        block = {
            "attn_norm": (n,), "ffn_norm": (n,), "attn_q": (n, n), "attn_output": (n, n), "attn_k": (kv, n),
            "attn_v": (kv, n),
        }  # fmt: skip
        if of.n_expert:
            block["ffn_gate_inp"] = (of.n_expert, n)
            block |= {f"ffn_{part}_exps": (of.n_expert, of.n_ff, n) for part in ("gate", "up")}
            block["ffn_down_exps"] = (of.n_expert, n, of.n_ff)
        else:
            block |= {"ffn_gate": (of.n_ff, n), "ffn_up": (of.n_ff, n), "ffn_down": (n, of.n_ff)}
        tensors |= {f"blk.{il}.{name}.weight": shape for name, shape in block.items()}
    return tensors
