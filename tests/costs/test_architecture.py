"""Which layers slide a window, attend, or carry state: the rules of architectures, from metadata alone."""

from __future__ import annotations

from typing import Any

import pytest

from scheduler.costs.architecture import Architecture, read_architecture
from scheduler.costs.families import ROWS
from scheduler.costs.header import Array, Scalar
from scheduler.costs.metadata import Metadata
from scheduler.errors import InvalidGGUF


def architecture(arch: str, n_layer: int = 8, **keys: Any) -> Architecture:
    """The architecture of a model with these keys; double underscores stand for dots, tuples for lists."""
    values: dict[str, Scalar | Array] = {"general.architecture": arch}
    basics = {
        "block_count": n_layer, "context_length": 4096, "embedding_length": 512, "attention__head_count": 8,
        "attention__head_count_kv": 2,
    }  # fmt: skip
    for key, value in (basics | keys).items():
        name = f"{arch}.{key.replace('__', '.')}"
        values[name] = Array("int32", len(value), value) if isinstance(value, tuple) else value
    return read_architecture(Metadata(values, "model.gguf"))


def letters(arch: Architecture) -> str:
    """One letter per layer: window, full attention, recurrent, both, or neither."""
    return "".join(
        "b" if k.is_recurrent and k.is_attention
        else "r" if k.is_recurrent
        else "-" if not k.is_attention
        else "w" if k.is_swa
        else "f"
        for k in arch.layers
    )  # fmt: skip


SSM = {"ssm__conv_kernel": 4, "ssm__inner_size": 1024, "ssm__state_size": 16, "ssm__group_count": 2}
KV = {"attention__head_count_kv": (2, 0, 0, 2, 0, 0, 2, 0)}


@pytest.mark.parametrize(
    ("arch", "keys", "layers"),
    [
        ("llama", {"attention__sliding_window": 1024}, "ffffffff"),
        ("phi3", {"attention__sliding_window": 1024}, "ffffffff"),
        ("gemma2", {}, "wfwfwfwf"),
        ("gemma3", {"attention__sliding_window": 512}, "wwwwwfww"),
        ("gemma3", {}, "ffffffff"),
        ("gemma3", {"attention__sliding_window": 512, "attention__sliding_window_pattern": 2}, "wfwfwfwf"),
        ("gemma3", {"attention__sliding_window": 512, "attention__sliding_window_pattern": (0, 1, 1)}, "fwwfffff"),
        ("gpt-oss", {"attention__sliding_window": 128}, "wfwfwfwf"),
        ("cohere2", {"attention__sliding_window": 128}, "wwwfwwwf"),
        ("llama4", {}, "wwwfwwwf"),
        ("llama4", {"attention__sliding_window": 0}, "ffffffff"),
        ("smallthinker", {"attention__sliding_window": 1}, "fwwwfwww"),
        ("laguna", {"attention__sliding_window": 64}, "fwwwfwww"),
        ("exaone4", {"attention__sliding_window": 64}, "ffffffff"),
        ("gemma4", {"attention__sliding_window": 64, "attention__sliding_window_pattern": (1, 1, 0) * 3}, "wwfwwfww"),
        ("gpt-oss", {"attention__sliding_window": 128, "nextn_predict_layers": 2}, "wfwfwf--"),
        ("qwen3next", SSM, "rrrfrrrf"),
        ("qwen35", {**SSM, "full_attention_interval": 2}, "rfrfrfrf"),
        ("qwen3next", {**SSM, "nextn_predict_layers": 1}, "rrrfrrr-"),
        ("qwen3next", {**SSM, "attention__recurrent_layers": (1, 0) * 4}, "rfrfrfrf"),
        ("granitehybrid", {**SSM, **KV}, "frrfrrfr"),
        ("lfm2", {"shortconv__l_cache": 3, **KV}, "frrfrrfr"),
        ("lfm2", {"shortconv__l_cache": 3, "attention__sliding_window": 9, **KV}, "wrrwrrwr"),
        ("kimi-linear", {"kda__head_dim": 128, "ssm__conv_kernel": 4, **KV}, "frrfrrfr"),
        ("nemotron_h", {**SSM, **KV, "feed_forward_length": (0, 0, 9, 0, 0, 9, 0, 0)}, "fr-fr-fr"),
        ("falcon-h1", SSM, "bbbbbbbb"),
        ("mamba", {**SSM, "attention__head_count": 0}, "rrrrrrrr"),
        ("rwkv7", {"wkv__head_size": 64}, "rrrrrrrr"),
        ("minimax-01", {}, "rrrrrrrf"),
    ],
)
def test_kinds_of_layers(arch: str, keys: dict[str, Any], layers: str) -> None:
    assert letters(architecture(arch, **keys)) == layers


def test_only_the_32b_of_exaone4_slides() -> None:
    assert letters(architecture("exaone4", 64)) == "wwwf" * 16


@pytest.mark.parametrize(
    ("arch", "keys", "state"),
    [
        ("mamba", SSM, (3 * 1024, 16 * 1024)),  # the group count is not read
        ("mamba2", SSM, (3 * (1024 + 2 * 2 * 16), 16 * 1024)),
        ("rwkv6", {"wkv__head_size": 64}, (2 * 512, 512 * 64)),
        ("rwkv6qwen2", {"wkv__head_size": 64, "token_shift_count": 1}, (512, 512 * 64)),
        ("lfm2", {"shortconv__l_cache": 3, **KV}, (2 * 512, 0)),
        ("kimi-linear", {"kda__head_dim": 128, "ssm__conv_kernel": 4, **KV}, (3 * 3 * 8 * 128, 128 * 128 * 8)),
        ("minimax-01", {}, (0, 64 * 64 * 8)),
        ("llama", {}, (0, 0)),
    ],
)
def test_size_of_the_recurrent_state(arch: str, keys: dict[str, Any], state: tuple[int, int]) -> None:
    read = architecture(arch, **keys)
    assert (read.state_r, read.state_s) == state


def test_latent_caches_hold_keys_only() -> None:
    mla = {
        "attention__head_count_kv": 1, "attention__key_length": 576, "attention__value_length": 512,
        "attention__key_length_mla": 192, "attention__value_length_mla": 128, "attention__kv_lora_rank": 512,
    }  # fmt: skip
    assert {(k.k_width, k.v_width) for k in architecture("deepseek2", **mla).layers} == {(576, 0)}
    old = architecture("deepseek2", attention__key_length=192, attention__value_length=128)
    assert {(k.k_width, k.v_width) for k in old.layers} == {(384, 256)}
    indexer = {"attention__indexer__key_length": 128, "attention__indexer__head_count": 64}
    sparse = architecture("deepseek32", **mla, **indexer)
    assert {(k.k_width, k.v_width, k.index_k_width) for k in sparse.layers} == {(576, 0, 128)}
    five_two = architecture("glm-dsa", 10, **mla, **indexer, context_length=1 << 20)
    assert [k.index_k_width // 128 for k in five_two.layers] == [1, 1, 1, 0, 0, 0, 1, 0, 0, 0]


def test_layers_that_read_the_cache_of_others() -> None:
    window = {"attention__sliding_window": 64, "attention__sliding_window_pattern": (1, 1, 1, 0, 1, 0, 1, 0)}
    shared = architecture("gemma4", **window, attention__shared_kv_layers=4)
    assert [bool(k.k_width) for k in shared.layers] == [True] * 4 + [False] * 4
    assert [shared.kv_source(il) for il in range(8)] == [0, 1, 2, 3, 2, 3, 2, 3]
    assert sum(bool(k.k_width) for k in architecture("gemma3n", 30, attention__sliding_window=64).layers) == 20
    with pytest.raises(InvalidGGUF, match="two must own a cache"):
        architecture("gemma4", **window, attention__shared_kv_layers=7)


def test_wider_heads_in_window_layers() -> None:
    keys = {"attention__sliding_window": 64, "attention__key_length_swa": 32, "attention__value_length_swa": 16}
    read = architecture("gpt-oss", 2, **keys)
    assert [(k.k_width, k.v_width) for k in read.layers] == [(64, 32), (128, 128)]
    assert read.v_width_max == 128


def test_encoders_have_no_cache() -> None:
    for arch in ("bert", "nomic-bert", "modern-bert"):
        read = architecture(arch)
        assert not read.has_cache
        assert not any(k.k_width for k in read.layers)
    assert {name for name, row in ROWS.items() if row.family == "encoder" and row.has_cache} == {
        "llama-embed", "t5encoder",
    }  # fmt: skip
    assert {name for name, row in ROWS.items() if row.family == "diffusion"} == {"dream", "llada", "llada-moe", "rnd1"}


@pytest.mark.parametrize(
    ("arch", "keys", "words"),
    [
        ("gemma4", {"attention__sliding_window": 64}, "sliding_window_pattern is missing"),
        ("qwen3next", {**SSM, "full_attention_interval": 0}, "full_attention_interval is 0"),
        ("mamba2", {**SSM, "ssm__group_count": "two"}, "not a whole number"),
        ("mamba", {}, "ssm.inner_size is missing"),
        ("llama", {"attention__causal": 3}, "not true or false"),
        ("llama", {"embedding_length": 1 << 33}, "absurd"),
        ("llama", {"block_count": 0}, "block_count 0 makes 0 layers"),
        ("graniteswitch", {"block_count": 0}, "block_count 0 makes 1 layers"),
        ("hrm_text", {"hrm__layers_per_stack": 2, "hrm__h_cycles": 2, "hrm__l_cycles": 0}, "make 4 layers of"),
        ("hrm_text", {"hrm__layers_per_stack": 2, "hrm__h_cycles": 3, "hrm__l_cycles": 2}, "make 18 layers of"),
    ],
)
def test_missing_and_absurd_keys(arch: str, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidGGUF, match=words):
        architecture(arch, **keys)
