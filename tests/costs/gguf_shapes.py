"""Models by their public hyper-parameters, as GGUF files with the tensors that llama.cpp expects of each architecture.

`GOLDEN` are the ten models of golden.json, quantised as llama.cpp's Q4_K_M mix. `SMALL` are models of many
architectures, small enough to be loaded for real, for tests that ask the installed library.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gguf_file import BY_NAME, Gguf, add_vocabulary, per_layer

Named = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Spec:
    """Hyper-parameters; widths in elements, 0 where the architecture has no such thing."""

    arch: str
    n_embd: int
    n_layer: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head: int
    n_vocab: int
    n_ctx: int
    n_expert: int = 0
    n_expert_used: int = 0
    n_ff_exp: int = 0
    n_ff_shexp: int = 0
    n_group_used: int = 0
    window: int = 0
    tied: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    rope_freqs: bool = False
    dense_lead: int = 0
    kv_lora: int = 0
    rope: int = 0
    nope: int = 0
    head_v: int = 0
    d_state: int = 0
    n_group: int = 0
    dt_rank: int = 0
    d_inner: int = 0
    nextn: int = 0
    pooling: int = 0
    per_layer: int = 0
    shared_kv: int = 0
    mix: str = "q4_k_m"

    @property
    def prefix(self) -> str:
        return self.arch


GOLDEN = {
    "llama-3.1-8b": Spec("llama", 4096, 32, 14336, 32, 8, 128, 128256, 131072, rope_freqs=True),
    "llama-3.2-3b": Spec("llama", 3072, 28, 8192, 24, 8, 128, 128256, 131072, rope_freqs=True, tied=True),
    "qwen2.5-0.5b": Spec("qwen2", 896, 24, 4864, 14, 2, 64, 151936, 32768, qkv_bias=True, tied=True),
    "qwen3-32b": Spec("qwen3", 5120, 64, 25600, 64, 8, 128, 151936, 40960, qk_norm=True),
    "qwen3-30b-a3b": Spec(
        "qwen3moe", 2048, 48, 6144, 32, 4, 128, 151936, 40960, 128, 8, n_ff_exp=768, qk_norm=True
    ),
    "mixtral-8x7b": Spec("llama", 4096, 32, 14336, 32, 8, 128, 32000, 32768, 8, 2, n_ff_exp=14336),
    "gemma-2-9b": Spec("gemma2", 3584, 42, 14336, 16, 8, 256, 256000, 8192, window=4096, tied=True),
    "gpt-oss-20b": Spec(
        "gpt-oss", 2880, 24, 2880, 64, 8, 64, 201088, 131072, 32, 4, n_ff_exp=2880, window=128, mix="mxfp4"
    ),
    "deepseek-v2-lite": Spec(
        "deepseek2", 2048, 27, 10944, 16, 1, 0, 102400, 163840, 64, 6, n_ff_exp=1408, n_ff_shexp=2816,
        dense_lead=1, kv_lora=512, rope=64, nope=128, head_v=128,
    ),
    "mistral-small-24b": Spec("llama", 5120, 40, 32768, 32, 8, 128, 131072, 32768),
}  # fmt: skip

_NORM_BIASES = ("phi2", "starcoder2", "stablelm")
_HYBRIDS = ("granitehybrid", "jamba", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe")
_DELTA_NETS = ("qwen3next", "qwen35", "qwen35moe")
_BERTS = ("bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3")
_LAYER_NORM = (*_NORM_BIASES, "command-r", "cohere2", "modern-bert", *_BERTS)
_POST_NORMS = ("gemma2", "gemma3", "gemma3n", "gemma4", "gemma-embedding", "glm4", "olmo2", "exaone4")

_TINY = Spec("llama", 128, 6, 256, 4, 2, 32, 320, 4096, mix="f16")
_TINY_MOE = replace(_TINY, n_expert=8, n_expert_used=2, n_ff_exp=64)
SMALL = {
    "llama": _TINY,
    "llama-tied": replace(_TINY, tied=True),
    "llama-rope-freqs": replace(_TINY, rope_freqs=True),
    "llama-q8": replace(_TINY, n_embd=160, mix="q8_0"),
    "mixtral": replace(_TINY_MOE, n_ff_exp=256),
    "qwen2": replace(_TINY, arch="qwen2", qkv_bias=True, tied=True),
    "qwen3": replace(_TINY, arch="qwen3", qk_norm=True),
    "qwen3moe": replace(_TINY_MOE, arch="qwen3moe", qk_norm=True),
    "gemma2": replace(_TINY, arch="gemma2", window=256, tied=True, n_layer=7),
    "gemma3": replace(_TINY, arch="gemma3", window=256, tied=True, qk_norm=True, n_layer=8),
    "gpt-oss": replace(_TINY_MOE, arch="gpt-oss", window=128),
    "mistral3": replace(_TINY, arch="mistral3"),
    "mistral3-unscaled": replace(_TINY, arch="mistral3", tied=True),
    "qwen2moe": replace(_TINY_MOE, arch="qwen2moe", qkv_bias=True, n_ff_shexp=128),
    "gemma": replace(_TINY, arch="gemma", tied=True),
    "phi2": replace(_TINY, arch="phi2", qkv_bias=True, n_head_kv=4),
    "glm4": replace(_TINY, arch="glm4", qkv_bias=True),
    "glm4moe": replace(_TINY_MOE, arch="glm4moe", qkv_bias=True, n_ff_shexp=64, dense_lead=1, qk_norm=True),
    "glm4moe-nextn": replace(_TINY_MOE, arch="glm4moe", n_layer=7, n_ff_shexp=64, dense_lead=1, nextn=1),
    "granite": replace(_TINY, arch="granite", tied=True),
    "granitemoe": replace(_TINY_MOE, arch="granitemoe", tied=True, n_ff_exp=256, n_ff_shexp=96),
    "command-r": replace(_TINY, arch="command-r", tied=True),
    "cohere2": replace(_TINY, arch="cohere2", tied=True, window=256, n_layer=8),
    "starcoder2": replace(_TINY, arch="starcoder2", qkv_bias=True, tied=True),
    "stablelm": replace(_TINY, arch="stablelm"),
    "smollm3": replace(_TINY, arch="smollm3", tied=True, n_layer=9),
    "ernie4_5": replace(_TINY, arch="ernie4_5", tied=True),
    "ernie4_5-moe": replace(_TINY_MOE, arch="ernie4_5-moe", dense_lead=1, n_ff_shexp=128),
    "exaone4": replace(_TINY, arch="exaone4", qk_norm=True, tied=True),
    "exaone4-windows": replace(_TINY, arch="exaone4", qk_norm=True, n_layer=8, window=256),
    "hunyuan-moe": replace(_TINY_MOE, arch="hunyuan-moe", qk_norm=True, n_ff_exp=256, n_ff_shexp=128),
    "seed_oss": replace(_TINY, arch="seed_oss", qkv_bias=True),
    "dots1": replace(_TINY_MOE, arch="dots1", n_head_kv=4, qk_norm=True, n_ff_shexp=64, dense_lead=1),
    "bailingmoe2": replace(_TINY_MOE, arch="bailingmoe2", qk_norm=True, n_ff_shexp=64, dense_lead=1),
    "olmo2": replace(_TINY, arch="olmo2"),
    "olmoe": replace(_TINY_MOE, arch="olmoe", n_head_kv=4, n_ff_exp=256),
    "fused": replace(_TINY, arch="phi3"),  # llama.cpp wants certain tokens of a model named phi3
    "deepseek2": replace(
        _TINY_MOE, arch="deepseek2", n_layer=4, n_head_kv=1, head=0, n_ff_shexp=64, dense_lead=1, kv_lora=64, rope=32,
        nope=32, head_v=32,
    ),
    "deepseek2-groups": replace(
        _TINY_MOE, arch="deepseek2", n_ff_shexp=64, dense_lead=1, kv_lora=128, rope=64, nope=64, head_v=64, n_head_kv=1,
        head=0, n_expert=16, n_group_used=2,
    ),
    "qwen3next": replace(
        _TINY_MOE, arch="qwen3next", n_layer=8, n_ff_shexp=64, d_state=32, n_group=2, dt_rank=4, d_inner=128, rope=32
    ),
    "bert": replace(_TINY, arch="bert", n_head_kv=4, qkv_bias=True, tied=True, pooling=2),
    "nomic-bert": replace(_TINY, arch="nomic-bert", n_head_kv=4, tied=True, pooling=1),
    "jina-bert-v2": replace(_TINY, arch="jina-bert-v2", n_head_kv=4, qkv_bias=True, tied=True),
    "jina-bert-v3": replace(_TINY, arch="jina-bert-v3", n_head_kv=4, qkv_bias=True, tied=True, pooling=1),
    "bert-reranker": replace(_TINY, arch="bert", n_head_kv=4, qkv_bias=True, tied=True, pooling=4),
    "nomic-bert-moe": replace(_TINY_MOE, arch="nomic-bert-moe", n_head_kv=4, qkv_bias=True, tied=True, pooling=1),
    "modern-bert": replace(_TINY, arch="modern-bert", n_head_kv=4, tied=True, pooling=2, window=128),
    "gemma-embedding": replace(_TINY, arch="gemma-embedding", qk_norm=True, tied=True, pooling=1, window=128),
    "gemma3n": replace(
        _TINY, arch="gemma3n", n_layer=23, qk_norm=True, tied=True, window=256, per_layer=256, n_head_kv=1
    ),
    "gemma4": replace(
        _TINY, arch="gemma4", n_layer=9, head=64, qk_norm=True, tied=True, window=256, per_layer=64, shared_kv=3,
        rope_freqs=True,
    ),
    "gemma4-moe": replace(_TINY_MOE, arch="gemma4", head=64, qk_norm=True, tied=True, window=256, rope_freqs=True),
    "qwen3-embedding": replace(_TINY, arch="qwen3", qk_norm=True, tied=True, pooling=3),
    "qwen35": replace(
        _TINY, arch="qwen35", n_layer=8, d_state=32, n_group=2, dt_rank=4, d_inner=128, rope=32
    ),
    "qwen35moe": replace(
        _TINY_MOE, arch="qwen35moe", n_layer=8, n_ff_shexp=64, d_state=32, n_group=4, dt_rank=4, d_inner=128, rope=32
    ),
    "qwen3next-nextn": replace(
        _TINY_MOE, arch="qwen3next", n_layer=9, n_ff_shexp=64, d_state=32, n_group=2, dt_rank=4, d_inner=128, rope=32,
        nextn=1,
    ),
    "granitehybrid": replace(
        _TINY, arch="granitehybrid", tied=True, d_state=16, n_group=1, dt_rank=8, d_inner=256
    ),
    "mamba": replace(_TINY, arch="mamba", n_ff=0, n_head=0, n_head_kv=0, head=0, tied=True, d_state=16, dt_rank=8,
                     d_inner=256),
    "mamba2": replace(_TINY, arch="mamba2", n_ff=0, n_head=0, n_head_kv=0, head=0, tied=True, d_state=16, dt_rank=8,
                      d_inner=256, n_group=2),
    "jamba": replace(_TINY, arch="jamba", d_state=16, dt_rank=8, d_inner=256),
    "lfm2": replace(_TINY, arch="lfm2", tied=True, qk_norm=True),
    "lfm2moe": replace(_TINY_MOE, arch="lfm2moe", tied=True, qk_norm=True, dense_lead=2),
    "falcon-h1": replace(_TINY, arch="falcon-h1", d_state=16, n_group=1, dt_rank=8, d_inner=256),
    "nemotron_h": replace(_TINY, arch="nemotron_h", d_state=16, n_group=2, dt_rank=8, d_inner=256),
    "nemotron_h_moe": replace(
        _TINY_MOE, arch="nemotron_h_moe", d_state=16, n_group=2, dt_rank=8, d_inner=256, n_ff_shexp=96
    ),
}  # fmt: skip


def write_model(spec: Spec, path: Path, *, version: int = 3, order: str = "<", vocabulary: bool = True) -> Path:
    """Write the model to `path` (sparse)."""
    return model_file(spec, path.stem, version=version, order=order, vocabulary=vocabulary).write(path)


def model_file(spec: Spec, name: str, *, version: int = 3, order: str = "<", vocabulary: bool = True) -> Gguf:
    """The model as a file in the making. Without its vocabulary it is for our eyes only, but written at once."""
    gguf = Gguf(version=version, order=order)
    gguf.set("general.architecture", spec.arch)
    gguf.set("general.name", name)
    per_layer(spec.arch, _hyper_parameters(spec), gguf)
    if spec.arch in _BERTS:
        gguf.set("tokenizer.ggml.token_type_count", 2)
    if vocabulary:
        add_vocabulary(gguf, spec.n_vocab)
    else:
        gguf.set(f"{spec.arch}.vocab_size", spec.n_vocab)
    gguf.tensors = [(name, ne, _type(name, ne, spec)) for name, ne in tensors(spec)]
    return gguf


def _hyper_parameters(s: Spec) -> Iterator[tuple[str, object]]:
    yield from (("block_count", s.n_layer), ("context_length", s.n_ctx), ("embedding_length", s.n_embd))
    dense = [s.n_ff if feeds_forward_only(s, il) else 0 for il in range(s.n_layer)]
    yield "feed_forward_length", dense if s.arch.startswith("nemotron_h") else s.n_ff
    yield "attention.layer_norm_rms_epsilon", 1e-5
    heads = [s.n_head_kv if attends(s, il) else 0 for il in range(s.n_layer)]
    yield "attention.head_count", s.n_head
    yield "attention.head_count_kv", heads if s.arch in _HYBRIDS else s.n_head_kv
    if s.kv_lora:
        yield from (("attention.key_length", s.kv_lora + s.rope), ("attention.value_length", s.kv_lora))
        yield from (("attention.key_length_mla", s.nope + s.rope), ("attention.value_length_mla", s.head_v))
        yield from (("attention.kv_lora_rank", s.kv_lora), ("rope.dimension_count", s.rope))
        yield from (("attention.q_lora_rank", s.kv_lora), ("leading_dense_block_count", s.dense_lead))
        yield from (("expert_shared_count", s.n_ff_shexp // s.n_ff_exp), ("expert_weights_scale", 1.0))
        yield from (("expert_weights_norm", True), ("expert_gating_func", 1))
    if s.n_group_used:
        yield from (("expert_group_count", s.n_expert // 4), ("expert_group_used_count", s.n_group_used))
    if s.arch in _LAYER_NORM or s.arch.startswith("nemotron_h"):
        yield "attention.layer_norm_epsilon", 1e-5
    if s.arch in ("glm4moe", "dots1", "bailingmoe2", "nemotron_h_moe"):
        yield from (("expert_shared_count", 1), ("leading_dense_block_count", s.dense_lead))
        yield from (("expert_gating_func", 2), ("expert_weights_norm", True), ("expert_weights_scale", 2.5))
    if s.arch == "ernie4_5-moe":
        yield from (("interleave_moe_layer_step", 1), ("leading_dense_block_count", s.dense_lead))
    if s.arch in ("granite", "granitemoe", "command-r", "cohere2"):
        yield "logit_scale", 8.0
    if s.arch in ("granite", "granitemoe"):
        yield from (("residual_scale", 0.2), ("embedding_scale", 12.0), ("rope.scaling.finetuned", True))
    if s.arch == "mistral3" and not s.tied:
        yield from (("attention.temperature_scale", 0.1), ("rope.scaling.original_context_length", 1024))
    if s.head:
        yield from (("attention.key_length", s.head), ("attention.value_length", s.head))
        yield "rope.dimension_count", s.rope or s.head
    if s.n_expert:
        yield from (("expert_count", s.n_expert), ("expert_used_count", s.n_expert_used))
        yield "expert_feed_forward_length", s.n_ff_exp
    if s.n_ff_shexp:
        yield "expert_shared_feed_forward_length", s.n_ff_shexp
    if s.arch == "gemma4":
        yield from (("attention.key_length_swa", s.head // 2), ("attention.value_length_swa", s.head // 2))
        yield from (("rope.dimension_count_swa", s.head // 2), ("final_logit_softcapping", 30.0))
        yield from (("embedding_length_per_layer_input", s.per_layer), ("attention.shared_kv_layers", s.shared_kv))
        yield "attention.sliding_window_pattern", [slides(s, il) for il in range(s.n_layer)]
    if s.arch == "nomic-bert-moe":
        yield "moe_every_n_layers", 2
    if s.window:
        yield "attention.sliding_window", s.window
    if s.d_inner:
        yield from (("ssm.conv_kernel", 4), ("ssm.state_size", s.d_state), ("ssm.time_step_rank", s.dt_rank))
        yield from (("ssm.inner_size", s.d_inner), ("ssm.group_count", s.n_group))
    if s.arch in ("qwen35", "qwen35moe"):
        yield "rope.dimension_sections", [4, 4, 8, 0]
    if s.arch in ("lfm2", "lfm2moe"):
        yield from (("shortconv.l_cache", 3), ("leading_dense_block_count", s.dense_lead), ("expert_gating_func", 2))
    if s.pooling:
        yield "pooling_type", s.pooling
    if s.nextn:
        yield "nextn_predict_layers", s.nextn


def slides(s: Spec, il: int) -> bool:
    """Whether layer `il` of gemma4 sees a window only."""
    return il % 3 < 2


def attends(s: Spec, il: int) -> bool:
    """Whether layer `il` attends; the others are recurrent."""
    if s.arch == "granitehybrid":
        return il % 2 == 1
    if s.arch in ("jamba", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe"):
        return il % 3 == 1
    if s.arch in _DELTA_NETS:
        return il >= s.n_layer - s.nextn or (il + 1) % 4 == 0
    return s.arch not in ("mamba", "mamba2")


def feeds_forward_only(s: Spec, il: int) -> bool:
    """Whether layer `il` neither attends nor carries a state."""
    return s.arch.startswith("nemotron_h") and il % 3 == 2


def tensors(s: Spec) -> Iterator[Named]:
    """Names and dimensions of all tensors, in the file's order."""
    yield "token_embd.weight", (s.n_embd, s.n_vocab)
    if s.arch in _BERTS:
        yield from (("token_embd_norm.weight", (s.n_embd,)), ("token_embd_norm.bias", (s.n_embd,)))
        yield "token_types.weight", (s.n_embd, 2)
        if s.arch == "bert":
            yield "position_embd.weight", (s.n_embd, s.n_ctx)
        if s.pooling == 4:
            yield from (("cls.weight", (s.n_embd, s.n_embd)), ("cls.bias", (s.n_embd,)))
            yield from (("cls.output.weight", (s.n_embd, 1)), ("cls.output.bias", (1,)))
        for il in range(s.n_layer):
            for name, ne in _bert_layer(s, il):
                yield f"blk.{il}.{name}", ne
        return
    yield "token_embd_norm.weight" if s.arch.startswith("lfm2") else "output_norm.weight", (s.n_embd,)
    if s.arch in _NORM_BIASES:
        yield "output_norm.bias", (s.n_embd,)
    if s.arch == "modern-bert":
        yield "token_embd_norm.weight", (s.n_embd,)
    if s.per_layer:
        yield "per_layer_token_embd.weight", (s.per_layer * s.n_layer, s.n_vocab)
        yield "per_layer_model_proj.weight", (s.n_embd, s.per_layer * s.n_layer)
        yield "per_layer_proj_norm.weight", (s.per_layer,)
    if s.arch == "gemma3n":
        yield from ((f"altup{part}_proj.weight", (s.n_embd, s.n_embd, 3)) for part in ("", "_unembd"))
    if not s.tied:
        yield "output.weight", (s.n_embd, s.n_vocab)
    if s.arch == "phi2":
        yield "output.bias", (s.n_vocab,)
    if s.rope_freqs:
        yield "rope_freqs.weight", (s.head // 2,)
    for il in range(s.n_layer):
        for name, ne in _layer(s, il):
            yield f"blk.{il}.{name}", ne


def _layer(s: Spec, il: int) -> Iterator[Named]:
    e = s.n_embd
    if s.arch not in ("olmo2", "exaone4") and (s.arch, il) != ("modern-bert", 0):
        yield "attn_norm.weight", (e,)
    if il >= s.n_layer - s.nextn:
        yield from (("nextn.eh_proj.weight", (2 * e, e)), ("nextn.enorm.weight", (e,)), ("nextn.hnorm.weight", (e,)))
        yield "nextn.shared_head_norm.weight", (e,)
    if s.arch == "falcon-h1":
        yield from _recurrent(s)
    if not feeds_forward_only(s, il):
        yield from _attention(s, il) if attends(s, il) else _recurrent(s)
    if s.arch in ("mamba", "mamba2") or (s.arch.startswith("nemotron_h") and not feeds_forward_only(s, il)):
        return
    if s.arch in _NORM_BIASES:
        yield "attn_norm.bias", (e,)
    if s.arch in (*_DELTA_NETS, "gpt-oss", "glm4moe", "seed_oss"):
        yield "post_attention_norm.weight", (e,)
    elif not s.arch.startswith("nemotron_h") and s.arch not in ("command-r", "cohere2", "phi2", "olmo2", "exaone4"):
        yield "ffn_norm" if s.arch == "falcon-h1" else "ffn_norm.weight", (e,)
        if s.arch in _NORM_BIASES:
            yield "ffn_norm.bias", (e,)
    if s.arch in _POST_NORMS:
        yield from (("post_attention_norm.weight", (e,)), ("post_ffw_norm.weight", (e,)))
    if s.per_layer:
        yield from (("inp_gate.weight", (e, s.per_layer)), ("proj.weight", (s.per_layer, e)))
        yield "post_norm.weight", (e,)
    if s.arch == "gemma3n":
        yield from (("altup_correct_coef.weight", (4, 4)), ("altup_correct_scale.weight", (e,)))
        yield from (("altup_predict_coef.weight", (4, 16)), ("altup_router.weight", (e, 4)))
        yield from (("altup_router_norm.weight", (e,)), ("laurel_l.weight", (e, 64)), ("laurel_r.weight", (64, e)))
        yield "laurel_post_norm.weight", (e,)
    if s.arch == "gemma4":
        yield "layer_output_scale.weight", (1,)
        if s.n_expert:
            yield from ((f"{name}.weight", (e,)) for name in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"))
            yield from (("ffn_gate_inp.scale", (e,)), ("ffn_down_exps.scale", (s.n_expert,)))
            yield from _dense(s)
    yield from _experts(s) if s.n_expert and il >= s.dense_lead else _dense(s)


def _bert_layer(s: Spec, il: int) -> Iterator[Named]:
    e = s.n_embd
    yield from _attention(s, il)
    for norm in ("attn_output_norm", "layer_output_norm"):
        yield from ((f"{norm}.weight", (e,)), (f"{norm}.bias", (e,)))
    if s.qkv_bias:
        yield "attn_output.bias", (e,)
    if s.n_expert and il % 2:
        yield from (("ffn_gate_inp.weight", (e, s.n_expert)), ("ffn_up_exps.weight", (e, s.n_ff, s.n_expert)))
        yield "ffn_down_exps.weight", (s.n_ff, e, s.n_expert)
        return
    yield from (("ffn_up.weight", (e, s.n_ff)), ("ffn_down.weight", (s.n_ff, e)))
    if s.qkv_bias:
        yield "ffn_down.bias", (e,)
    if s.arch in ("nomic-bert", "jina-bert-v2"):
        yield "ffn_gate.weight", (e, s.n_ff)


def _attention(s: Spec, il: int) -> Iterator[Named]:
    if s.arch == "gemma4" and slides(s, il):
        s = replace(s, head=s.head // 2)
    e, q, kv = s.n_embd, s.n_head * s.head, s.n_head_kv * s.head
    if s.arch == "modern-bert":
        yield from (("attn_qkv.weight", (e, 3 * e)), ("attn_output.weight", (e, e)))
        return
    if s.kv_lora:
        lite = s.n_layer in (26, 27)  # llama.cpp tells the lite models by their depth: queries are not compressed
        width = s.n_head * (s.nope + s.rope)
        if not lite:
            yield from (("attn_q_a.weight", (e, s.kv_lora)), ("attn_q_a_norm.weight", (s.kv_lora,)))
        yield ("attn_q.weight", (e, width)) if lite else ("attn_q_b.weight", (s.kv_lora, width))
        yield from (("attn_kv_a_mqa.weight", (e, s.kv_lora + s.rope)), ("attn_kv_a_norm.weight", (s.kv_lora,)))
        yield from (
            ("attn_k_b.weight", (s.nope, s.kv_lora, s.n_head)),
            ("attn_v_b.weight", (s.kv_lora, s.head_v, s.n_head)),
        )
        yield "attn_output.weight", (s.n_head * s.head_v, e)
        return
    if s.arch in ("phi3", "bailingmoe2"):
        yield from (("attn_qkv.weight", (e, q + 2 * kv)), ("attn_output.weight", (q, e)))
        if s.qk_norm:
            yield from (("attn_q_norm.weight", (s.head,)), ("attn_k_norm.weight", (s.head,)))
        return
    yield "attn_q.weight", (e, 2 * q if s.arch in _DELTA_NETS else q)
    yield from (("attn_k.weight", (e, kv)), ("attn_v.weight", (e, kv)), ("attn_output.weight", (q, e)))
    if s.qkv_bias or s.arch == "gpt-oss":
        yield from (("attn_q.bias", (q,)), ("attn_k.bias", (kv,)), ("attn_v.bias", (kv,)))
    if s.arch in ("phi2", "starcoder2"):
        yield "attn_output.bias", (e,)
    if s.arch in ("olmo2", "olmoe"):
        yield from (("attn_q_norm.weight", (q,)), ("attn_k_norm.weight", (kv,)))
    if s.arch == "gpt-oss":
        yield from (("attn_output.bias", (e,)), ("attn_sinks.weight", (s.n_head,)))
    if s.qk_norm or s.arch in _DELTA_NETS:
        yield from (("attn_q_norm.weight", (s.head,)), ("attn_k_norm.weight", (s.head,)))


def _recurrent(s: Spec) -> Iterator[Named]:
    e, inner = s.n_embd, s.d_inner
    channels = inner + 2 * s.n_group * s.d_state
    if s.arch in _DELTA_NETS:
        yield from (("attn_qkv.weight", (e, channels)), ("attn_gate.weight", (e, inner)))
        yield from (("ssm_conv1d.weight", (4, channels)), ("ssm_dt.bias", (s.dt_rank,)), ("ssm_a", (s.dt_rank,)))
        if s.arch == "qwen3next":
            yield "ssm_ba.weight", (e, 2 * s.dt_rank)
        else:
            yield from (("ssm_beta.weight", (e, s.dt_rank)), ("ssm_alpha.weight", (e, s.dt_rank)))
        yield "ssm_norm.weight", (s.d_state,)
        yield "ssm_out.weight", (inner, e)
    elif s.arch in ("lfm2", "lfm2moe"):
        yield from (("shortconv.conv.weight", (3, e)), ("shortconv.in_proj.weight", (e, 3 * e)))
        yield "shortconv.out_proj.weight", (e, e)
    elif s.arch not in ("mamba", "jamba"):
        yield "ssm_in.weight", (e, inner + channels + s.dt_rank)
        yield from (("ssm_conv1d.weight", (4, channels)), ("ssm_conv1d.bias", (channels,)))
        yield from (("ssm_dt.bias", (s.dt_rank,)), ("ssm_a", (1, s.dt_rank)), ("ssm_d", (1, s.dt_rank)))
        yield from (("ssm_norm.weight", (inner // s.n_group, s.n_group)), ("ssm_out.weight", (inner, e)))
    else:
        yield from (("ssm_in.weight", (e, 2 * inner)), ("ssm_conv1d.weight", (4, inner)), ("ssm_conv1d.bias", (inner,)))
        yield from (("ssm_x.weight", (inner, s.dt_rank + 2 * s.d_state)), ("ssm_dt.weight", (s.dt_rank, inner)))
        yield from (("ssm_dt.bias", (inner,)), ("ssm_a", (s.d_state, inner)), ("ssm_d", (inner,)))
        yield "ssm_out.weight", (inner, e)
        if s.arch == "jamba":
            yield from (("ssm_dt_norm.weight", (s.dt_rank,)), ("ssm_b_norm.weight", (s.d_state,)))
            yield "ssm_c_norm.weight", (s.d_state,)


def _dense(s: Spec) -> Iterator[Named]:
    if s.arch in ("phi3", "glm4", "modern-bert"):
        yield "ffn_up.weight", (s.n_embd, 2 * s.n_ff)
    elif s.arch == "nemotron_h":
        yield "ffn_up.weight", (s.n_embd, s.n_ff)
    elif s.arch in ("phi2", "starcoder2"):
        yield from (("ffn_up.weight", (s.n_embd, s.n_ff)), ("ffn_up.bias", (s.n_ff,)), ("ffn_down.bias", (s.n_embd,)))
    else:
        yield from (("ffn_gate.weight", (s.n_embd, s.n_ff)), ("ffn_up.weight", (s.n_embd, s.n_ff)))
    yield "ffn_down.weight", (s.n_ff, s.n_embd)


def _experts(s: Spec) -> Iterator[Named]:
    e, f, n = s.n_embd, s.n_ff_exp, s.n_expert
    gated = s.arch != "nemotron_h_moe"
    yield "ffn_gate_inp.weight", (e, n)
    if gated:
        yield "ffn_gate_exps.weight", (e, f, n)
    yield from (("ffn_up_exps.weight", (e, f, n)), ("ffn_down_exps.weight", (f, e, n)))
    if s.arch == "gpt-oss":
        yield from (("ffn_gate_inp.bias", (n,)), ("ffn_gate_exps.bias", (f, n)))
        yield from (("ffn_up_exps.bias", (f, n)), ("ffn_down_exps.bias", (e, n)))
    if s.n_ff_shexp:
        if gated:
            yield "ffn_gate_shexp.weight", (e, s.n_ff_shexp)
        yield "ffn_up_shexp.weight", (e, s.n_ff_shexp)
        yield "ffn_down_shexp.weight", (s.n_ff_shexp, e)
    if s.arch in ("qwen2moe", "qwen3next", "qwen35moe"):
        yield "ffn_gate_inp_shexp.weight", (e,)
    if s.n_group_used or s.arch in ("glm4moe", "dots1", "ernie4_5-moe", "nemotron_h_moe", "lfm2moe"):
        yield "exp_probs_b.bias", (n,)


_SINGLE = ("norm", "ffn_gate_inp", "ssm_conv1d", "ssm_a", "ssm_d.", "attn_sinks")


def _type(name: str, ne: tuple[int, ...], s: Spec) -> str:
    """The type that the quantiser gives this tensor (src/llama-quant.cpp for the Q4_K_M mix)."""
    if len(ne) == 1 or name.endswith((".bias", "ssm_d")) or any(part in name for part in _SINGLE):
        return "f32"
    if s.mix in ("f16", "q8_0"):
        return s.mix if ne[0] % BY_NAME[s.mix].block == 0 else "f16"
    if s.mix == "mxfp4":
        return "mxfp4" if "_exps" in name else "q8_0"
    kind = _q4_k_m(name, s)
    if ne[0] % 256:
        kind = {"q4_K": "q5_0", "q5_K": "q5_1", "q6_K": "q8_0"}.get(kind, kind)
    return kind if ne[0] % BY_NAME[kind].block == 0 else "f16"


def _q4_k_m(name: str, s: Spec) -> str:
    il = int(name.split(".")[1]) if name.startswith("blk.") else 0
    eighth = s.n_layer // 8
    more_bits = il < eighth or il >= 7 * s.n_layer // 8 or (il - eighth) % 3 == 2
    few_experts = s.n_expert == 8
    if name == "output.weight" or (name == "token_embd.weight" and s.tied):
        return "q6_K"
    if few_experts and ("attn_v" in name or "attn_k." in name):
        return "q8_0"
    if few_experts and "attn_output" in name:
        return "q5_K"
    return "q6_K" if more_bits and ("attn_v" in name or "ffn_down" in name) else "q4_K"
