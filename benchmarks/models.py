"""Models for measurements: llamas with random weights, quantised, and byte-pair vocabularies of random words.

They compute what real ones of that size do, and say nonsense. They can be asked for as many tokens as wanted: none of
hundreds of thousands of random numbers is likely to be the one that ends an answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

_POOL_ROWS = 61  # rows that are drawn for a matrix, and then repeated: quantising takes longer than all the rest


@dataclass(frozen=True, slots=True)
class Shape:
    """`weights`: of the layers' matrices; the embedding is Q8_0 where they are quantised, and also the output."""

    n_vocab: int
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_head_kv: int
    weights: Type


TINY = Shape(2_000, 128, 384, 2, 2, 2, Type.F16)
SMALL = Shape(32_000, 512, 1536, 8, 8, 4, Type.Q8_0)
QWEN_HALF_B = Shape(151_936, 896, 4864, 24, 14, 2, Type.Q5_0)
"""The shape and size of Qwen2.5-0.5B in Q4_K_M: its rows do not divide into k-quants and are Q5_0 for the most part."""

QWEN_VOCABULARY = Shape(151_936, 64, 192, 1, 1, 1, Type.F16)
GEMMA_VOCABULARY = Shape(262_144, 64, 192, 1, 1, 1, Type.F16)
"""Models that are nearly all vocabulary, of the size that Qwen's or Gemma's has: what sampling costs shows in them."""


def write_model(path: Path, shape: Shape, n_ctx: int = 32768) -> Path:
    """Writes it, and returns its path."""
    numbers = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    tokens, merges = _vocabulary(shape.n_vocab)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (shape.n_vocab - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(shape.n_vocab - 1)

    def vector(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(shape.n_embd, np.float32))

    def matrix(name: str, n_rows: int, n_columns: int, weights: Type, *, n_zeros: int = 0) -> None:
        drawn = numbers.standard_normal((min(n_rows, _POOL_ROWS), n_columns), np.float32) * 0.02
        rows = gguf.quants.quantize(drawn, weights)
        every = np.tile(rows, (-(-n_rows // len(rows)), 1))[:n_rows]
        every[:n_zeros] = gguf.quants.quantize(np.zeros((1, n_columns), np.float32), weights)
        writer.add_tensor(f"{name}.weight", every, raw_dtype=weights)

    n_kv = shape.n_embd // shape.n_head * shape.n_head_kv
    # Single bytes are never said: half of a character would be held back until it is whole.
    embedding = Type.F16 if shape.weights == Type.F16 else Type.Q8_0
    matrix("token_embd", shape.n_vocab, shape.n_embd, embedding, n_zeros=256)
    vector("output_norm")
    for il in range(shape.n_layer):
        vector(f"blk.{il}.attn_norm")
        vector(f"blk.{il}.ffn_norm")
        matrix(f"blk.{il}.attn_q", shape.n_embd, shape.n_embd, shape.weights)
        matrix(f"blk.{il}.attn_k", n_kv, shape.n_embd, shape.weights)
        matrix(f"blk.{il}.attn_v", n_kv, shape.n_embd, shape.weights)
        matrix(f"blk.{il}.attn_output", shape.n_embd, shape.n_embd, shape.weights)
        matrix(f"blk.{il}.ffn_gate", shape.n_ff, shape.n_embd, shape.weights)
        matrix(f"blk.{il}.ffn_up", shape.n_ff, shape.n_embd, shape.weights)
        matrix(f"blk.{il}.ffn_down", shape.n_embd, shape.n_ff, shape.weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_encoder(path: Path) -> Path:
    """Writes an encoder of the shape of all-MiniLM-L6-v2 in F16, and returns its path."""
    n_embd, n_ff, n_layer, n_ctx = 384, 1536, 6, 512
    numbers = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(12)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("jina-v2-en")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokens = [*special, *(f"\u2581{word}" for word in words())]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(special) + [gguf.TokenType.NORMAL] * len(words()))
    writer.add_token_type_count(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)  # what a text begins with is its [CLS]
    writer.add_sep_token_id(3)
    writer.add_eos_token_id(3)

    def linear(name: str, n_rows: int, n_columns: int) -> None:
        writer.add_tensor(f"{name}.weight", (numbers.standard_normal((n_rows, n_columns)) * 0.02).astype(np.float16))
        writer.add_tensor(f"{name}.bias", np.zeros(n_rows, np.float32))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(n_embd, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(n_embd, np.float32))

    for name, n_rows in (("token_embd", len(tokens)), ("position_embd", n_ctx)):
        writer.add_tensor(f"{name}.weight", (numbers.standard_normal((n_rows, n_embd)) * 0.02).astype(np.float16))
    writer.add_tensor("token_types.weight", np.zeros((2, n_embd), np.float32))
    norm("token_embd_norm")
    for il in range(n_layer):
        for stem in ("attn_q", "attn_k", "attn_v", "attn_output"):
            linear(f"blk.{il}.{stem}", n_embd, n_embd)
        norm(f"blk.{il}.attn_output_norm")
        linear(f"blk.{il}.ffn_up", n_ff, n_embd)
        linear(f"blk.{il}.ffn_down", n_embd, n_ff)
        norm(f"blk.{il}.layer_output_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def words() -> list[str]:
    """Words that every one of these models knows."""
    return [token for token in _vocabulary(TINY.n_vocab)[0][256:-1] if token.isascii() and len(token) > 2]


def _vocabulary(n_vocab: int) -> tuple[list[str], list[str]]:
    """Tokens, the last of which ends an answer, and merges."""
    chance = random.Random(0)
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    tokens = [chr(code) for code in [*printable, *range(256, 256 + len(others))]]
    merges, known, letters = [], set(tokens), [chr(code) for code in range(ord("a"), ord("z") + 1)]
    while len(tokens) < n_vocab - 1:
        first, second = chance.choice(tokens[:60_000]), chance.choice(letters)
        if len(first) < 12 and first + second not in known:
            known.add(first + second)
            tokens.append(first + second)
            merges.append(f"{first} {second}")
    return [*tokens, "<end>"], merges
