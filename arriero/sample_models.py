"""Small GGUF models that really run, written in a moment: for the demo and the tests, where no download may happen.

The weights are random and mean nothing; the architectures, shapes and files are real, so llama.cpp places, loads and
computes them like any other model. They speak in made-up sentences (`sample_language`), never end by themselves and so
always run to `max_tokens`.
Equal arguments write equal files. Sizes are F16; writing costs about 1 s per 200 MiB.
Shapes of each architecture's tensors: llama.cpp, src/models/*.cpp. Needs numpy and gguf.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from arriero.sample_language import add_vocabulary, embedding_and_output

if TYPE_CHECKING:
    import gguf
    import numpy as np
    import numpy.typing as npt

Kind = Literal["llama", "qwen3moe", "gemma3", "deepseek2", "glm4moe", "granitehybrid", "mamba", "qwen35"]
Fill = tuple[Literal["normal", "constant", "decay", "diagonal"], float]
"""What a tensor holds: normal numbers of that spread, that constant, that number on its diagonal, or (for the A of a
state-space layer) negative numbers of that size."""
Tensor = tuple[str, tuple[int, ...], Fill]  # name, shape in numpy's order (the reverse of ggml's), contents

_POOL = 1_000_003  # random numbers drawn per model, then tiled: prime, so that no two rows of a matrix are alike
_SINGLE_PRECISION = ("ffn_gate_inp.weight", "ssm_conv1d.weight", "ssm_a", "ssm_d", "ssm_norm.weight")


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a sample model; fields that an architecture does not have are ignored by it."""

    n_layer: int = 6
    n_embd: int = 256
    n_ff: int = 768
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 64
    n_expert: int = 8
    n_expert_used: int = 2
    n_ff_expert: int = 256
    n_latent: int = 128  # MLA: width of the compressed queries, keys and values
    n_nextn: int = 0  # glm4moe, qwen35: prediction layers (MTP) on top of the others, at most one
    n_state: int = 16  # state-space layers: state per channel
    n_time: int = 8  # state-space layers: rank of the time step (mamba) or number of heads (mamba-2, qwen35)
    sliding_window: int = 256
    n_ctx_train: int = 4096

    @property
    def n_rope(self) -> int:
        """MLA: the part of a head that carries the position."""
        return self.head_dim // 2


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample model of the demo: what it is and why it is there."""

    kind: Kind
    shape: Shape
    about: str


SAMPLES: Mapping[str, Sample] = {
    "cria-llama": Sample("llama", Shape(), "small and dense; fits anywhere"),
    "lana-gemma3": Sample(
        "gemma3", Shape(n_layer=12, n_embd=320, n_ff=960), "sliding-window attention; its cache stays small"
    ),
    "tropa-qwen3moe": Sample(
        "qwen3moe", Shape(n_layer=8, n_expert=10, n_expert_used=2, n_ff_expert=256), "mixture of ten experts"
    ),
    "sabio-deepseek2": Sample(
        "deepseek2", Shape(n_layer=8, n_ff=1024, n_expert=8), "latent attention (MLA) and experts; a tiny cache"
    ),
    "quipu-granite": Sample(
        "granitehybrid", Shape(n_layer=8, n_embd=384, n_ff=1024), "state-space layers with some attention"
    ),
    "yunta-llama": Sample(
        "llama",
        Shape(n_layer=14, n_embd=512, n_ff=1536, n_head=8, n_head_kv=4),
        "dense; too large for one small GPU, right for two",
    ),
    "recua-llama": Sample(
        "llama",
        Shape(n_layer=30, n_embd=512, n_ff=1536, n_head=8, n_head_kv=4),
        "dense; too large for both GPUs, so some layers stay in host RAM",
    ),
    "caravana-qwen3moe": Sample(
        "qwen3moe",
        Shape(n_layer=10, n_embd=384, n_head=6, n_expert=16, n_ff_expert=512),
        "large experts; they stay in host RAM while the rest goes to a GPU",
    ),
}


def write_samples(directory: str | Path) -> list[Path]:
    """Writes every model of `SAMPLES` as `<name>.gguf`; one that is there already is left alone."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for seed, (name, sample) in enumerate(SAMPLES.items()):
        path = folder / f"{name}.gguf"
        if not path.exists():
            write_sample_model(path, sample.kind, seed=seed, **asdict(sample.shape))
        paths.append(path)
    return paths


def write_sample_model(
    path: str | Path, kind: Kind, *, seed: int = 0, precision: Literal["f16", "f32"] = "f16", **sizes: int
) -> Path:
    """Writes one model, complete or not at all, and returns its path. Overwrites.

    `sizes` are fields of `Shape`. With `precision` "f32" the file is twice as large, and computing it differently
    (batched, in pieces) changes its logits by a millionth instead of a thousandth.
    """
    import gguf
    import numpy as np

    shape = Shape(**sizes)
    number = np.float32 if precision == "f32" else np.float16
    final = Path(path)
    partial = final.with_name(final.name + ".part")
    writer = gguf.GGUFWriter(str(partial), kind)
    try:
        writer.add_name(final.stem)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32 if precision == "f32" else gguf.LlamaFileType.MOSTLY_F16)
        add_vocabulary(writer)
        _add_parameters(writer, kind, shape)
        rng = np.random.default_rng(seed)
        embedding, output = embedding_and_output(rng, shape.n_embd)
        if kind == "gemma3":
            embedding *= shape.n_embd**-0.5  # Gemma multiplies by the root of its width
        writer.add_tensor("token_embd.weight", embedding.astype(number))
        writer.add_tensor("output_norm.weight", np.ones(shape.n_embd, np.float32))
        writer.add_tensor("output.weight", output.astype(number))
        fill = _Filling(rng, number)
        for name, dims, contents in _tensors(kind, shape):
            writer.add_tensor(name, fill(name, dims, contents))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    partial.replace(final)
    return final


class _Filling:
    """Numbers for the tensors: slices of one pool of random numbers, each begun at a random place."""

    def __init__(self, rng: np.random.Generator, number: type[np.floating[Any]]) -> None:
        self._rng = rng
        self._number = number
        self._pool = rng.standard_normal(_POOL, dtype="float32")

    def __call__(self, name: str, dims: tuple[int, ...], fill: Fill) -> npt.NDArray[Any]:
        import numpy as np

        kind, size = fill
        if kind == "constant":
            return np.full(dims, size, np.float32)
        if kind == "diagonal":
            return np.asarray(size * np.eye(dims[0], dims[1]), self._number)
        single = len(dims) == 1 or name.endswith(_SINGLE_PRECISION)
        pool = np.roll(self._pool, -int(self._rng.integers(_POOL)))[: math.prod(dims)]
        if kind == "decay":
            pool = -np.abs(pool) - np.float32(0.1)
        return np.resize((pool * size).astype(np.float32 if single else self._number), dims)


# Architectures: metadata and tensors


def _add_parameters(writer: gguf.GGUFWriter, kind: Kind, shape: Shape) -> None:
    import gguf

    writer.add_block_count(shape.n_layer + shape.n_nextn)
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(0 if kind == "mamba" else shape.n_ff)
    writer.add_layer_norm_rms_eps(1e-5)
    if kind in ("granitehybrid", "mamba", "qwen35"):
        _add_state_space(writer, kind, shape)
    if kind == "mamba":
        writer.add_head_count(0)
        return
    key, value, rope = shape.head_dim, shape.head_dim, shape.head_dim
    writer.add_head_count(shape.n_head)
    if kind == "granitehybrid":
        writer.add_head_count_kv([shape.n_head_kv * _attends(layer) for layer in range(shape.n_layer)])
        writer.add_bool(f"{kind}.rope.scaling.finetuned", False)
    elif kind == "deepseek2":
        key, value, rope = shape.n_latent + shape.n_rope, shape.n_latent, shape.n_rope
        writer.add_head_count_kv(1)
        writer.add_key_length_mla(shape.head_dim)
        writer.add_value_length_mla(shape.head_dim)
        writer.add_q_lora_rank(shape.n_latent)
        writer.add_kv_lora_rank(shape.n_latent)
        writer.add_leading_dense_block_count(1)
        writer.add_expert_shared_count(1)
        writer.add_expert_weights_scale(1.0)
        writer.add_expert_weights_norm(True)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    else:
        writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(key)
    writer.add_value_length(value)
    writer.add_rope_dimension_count(rope)
    writer.add_rope_freq_base(10000.0)
    if kind == "gemma3":
        writer.add_sliding_window(shape.sliding_window)
    if kind == "qwen35":
        writer.add_rope_dimension_sections([rope // 8, rope // 8, rope // 4, 0])
        writer.add_nextn_predict_layers(shape.n_nextn)
    if kind == "glm4moe":
        writer.add_leading_dense_block_count(1)
        writer.add_expert_shared_count(1)
        writer.add_nextn_predict_layers(shape.n_nextn)
    if kind in ("qwen3moe", "deepseek2", "glm4moe"):
        writer.add_expert_count(shape.n_expert)
        writer.add_expert_used_count(shape.n_expert_used)
        writer.add_expert_feed_forward_length(shape.n_ff_expert)


def _add_state_space(writer: gguf.GGUFWriter, kind: Kind, shape: Shape) -> None:
    writer.add_ssm_conv_kernel(_CONV)
    writer.add_ssm_state_size(shape.n_state)
    writer.add_ssm_inner_size(shape.n_state * shape.n_time if kind == "qwen35" else 2 * shape.n_embd)
    writer.add_ssm_time_step_rank(shape.n_time)
    writer.add_ssm_group_count({"mamba": 0, "qwen35": shape.n_time // 2}.get(kind, 1))


def _attends(layer: int) -> bool:
    """In the hybrids every fourth layer has attention, the others a state."""
    return layer % 4 == 3


def _tensors(kind: Kind, shape: Shape) -> Iterator[Tensor]:
    for layer in range(shape.n_layer + shape.n_nextn):
        for name, dims, fill in _layer(kind, shape, layer):
            yield f"blk.{layer}.{name}", dims, fill
        if layer >= shape.n_layer:
            for name, dims, fill in _prediction(shape):
                yield f"blk.{layer}.nextn.{name}", dims, fill


def _layer(kind: Kind, shape: Shape, layer: int) -> Iterator[Tensor]:
    quiet = (2 * shape.n_layer) ** -0.5  # all layers together weigh as much as the embedding does
    yield "attn_norm.weight", (shape.n_embd,), _ONE
    if kind == "mamba":
        yield from _mamba(shape, quiet)
        return
    if kind == "granitehybrid" and not _attends(layer):
        yield from _mamba2(shape, quiet)
    elif kind == "qwen35" and layer < shape.n_layer and not _attends(layer):
        yield from _delta_net(shape, quiet)
    elif kind == "deepseek2":
        yield from _latent_attention(shape, quiet)
    else:
        yield from _attention(kind, shape, quiet)
    norm = "post_attention_norm" if kind in ("glm4moe", "qwen35") else "ffn_norm"
    yield f"{norm}.weight", (shape.n_embd,), _ONE
    if kind == "gemma3":
        yield "post_attention_norm.weight", (shape.n_embd,), ("constant", quiet)
        yield "post_ffw_norm.weight", (shape.n_embd,), ("constant", quiet)
    if kind == "qwen3moe" or (kind in ("deepseek2", "glm4moe") and layer > 0):
        yield from _experts(kind, shape, quiet)
    else:
        yield from _feed_forward("", shape.n_embd, shape.n_ff, quiet)


def _attention(kind: Kind, shape: Shape, quiet: float) -> Iterator[Tensor]:
    width, width_kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    queries = width * (2 if kind == "qwen35" else 1)  # and a gate for what attention returns
    yield "attn_q.weight", (queries, shape.n_embd), _normal(shape.n_embd, _FOCUS)
    yield "attn_k.weight", (width_kv, shape.n_embd), _normal(shape.n_embd, _FOCUS)
    yield "attn_v.weight", (width_kv, shape.n_embd), _normal(shape.n_embd)
    yield "attn_output.weight", (shape.n_embd, width), _normal(width, 3 * quiet)
    if kind in ("qwen3moe", "gemma3", "qwen35"):
        yield "attn_q_norm.weight", (shape.head_dim,), ("constant", _FOCUS)
        yield "attn_k_norm.weight", (shape.head_dim,), ("constant", _FOCUS)


def _latent_attention(shape: Shape, quiet: float) -> Iterator[Tensor]:
    plain = shape.head_dim - shape.n_rope
    width = shape.n_head * shape.head_dim
    yield "attn_q_a.weight", (shape.n_latent, shape.n_embd), _normal(shape.n_embd)
    yield "attn_q_a_norm.weight", (shape.n_latent,), _ONE
    yield "attn_q_b.weight", (width, shape.n_latent), _normal(shape.n_latent, _FOCUS)
    yield "attn_kv_a_mqa.weight", (shape.n_latent + shape.n_rope, shape.n_embd), _normal(shape.n_embd, _FOCUS)
    yield "attn_kv_a_norm.weight", (shape.n_latent,), _ONE
    yield "attn_k_b.weight", (shape.n_head, shape.n_latent, plain), _normal(plain)
    yield "attn_v_b.weight", (shape.n_head, shape.head_dim, shape.n_latent), _normal(shape.n_latent)
    yield "attn_output.weight", (shape.n_embd, width), _normal(width, 3 * quiet)


def _feed_forward(suffix: str, n_embd: int, n_ff: int, quiet: float) -> Iterator[Tensor]:
    yield f"ffn_gate{suffix}.weight", (n_ff, n_embd), _normal(n_embd)
    yield f"ffn_up{suffix}.weight", (n_ff, n_embd), _normal(n_embd)
    yield f"ffn_down{suffix}.weight", (n_embd, n_ff), _normal(n_ff, quiet)


def _experts(kind: Kind, shape: Shape, quiet: float) -> Iterator[Tensor]:
    yield "ffn_gate_inp.weight", (shape.n_expert, shape.n_embd), _normal(shape.n_embd)
    for name, (rows, columns), fill in _feed_forward("_exps", shape.n_embd, shape.n_ff_expert, quiet):
        yield name, (shape.n_expert, rows, columns), fill
    if kind == "glm4moe":
        yield "exp_probs_b.bias", (shape.n_expert,), ("constant", 0.0)
    if kind in ("deepseek2", "glm4moe"):
        yield from _feed_forward("_shexp", shape.n_embd, shape.n_ff_expert, quiet)


def _prediction(shape: Shape) -> Iterator[Tensor]:
    """A layer that looks at the last token and, through its attention, at others, but not at the activations: so it
    guesses phrases inside of a sentence, and not which sentence comes next."""
    yield "eh_proj.weight", (shape.n_embd, 2 * shape.n_embd), ("diagonal", 1.0)
    for name in ("enorm", "hnorm", "shared_head_norm"):
        yield f"{name}.weight", (shape.n_embd,), _ONE


def _mamba(shape: Shape, quiet: float) -> Iterator[Tensor]:
    inner, state, time = 2 * shape.n_embd, shape.n_state, shape.n_time
    yield "ssm_in.weight", (2 * inner, shape.n_embd), _normal(shape.n_embd)
    yield "ssm_conv1d.weight", (inner, _CONV), _normal(_CONV)
    yield "ssm_conv1d.bias", (inner,), ("normal", 0.02)
    yield "ssm_x.weight", (time + 2 * state, inner), _normal(inner)
    yield "ssm_dt.weight", (inner, time), _normal(time)
    yield "ssm_dt.bias", (inner,), ("normal", 0.02)
    yield "ssm_a", (inner, state), ("decay", 1.0)
    yield "ssm_d", (inner,), _ONE
    yield "ssm_out.weight", (shape.n_embd, inner), _normal(inner, 2 * quiet)


def _mamba2(shape: Shape, quiet: float) -> Iterator[Tensor]:
    inner, state, heads = 2 * shape.n_embd, shape.n_state, shape.n_time
    yield "ssm_in.weight", (2 * inner + 2 * state + heads, shape.n_embd), _normal(shape.n_embd)
    yield "ssm_conv1d.weight", (inner + 2 * state, _CONV), _normal(_CONV)
    yield "ssm_conv1d.bias", (inner + 2 * state,), ("normal", 0.02)
    yield "ssm_dt.bias", (heads,), ("normal", 0.02)
    yield "ssm_a", (heads, 1), ("decay", 1.0)
    yield "ssm_d", (heads, 1), _ONE
    yield "ssm_norm.weight", (1, inner), _ONE
    yield "ssm_out.weight", (shape.n_embd, inner), _normal(inner, quiet)


def _delta_net(shape: Shape, quiet: float) -> Iterator[Tensor]:
    """Half as many heads for queries and keys as for values."""
    heads, inner = shape.n_time, shape.n_state * shape.n_time
    yield "attn_qkv.weight", (2 * inner, shape.n_embd), _normal(shape.n_embd)
    yield "attn_gate.weight", (inner, shape.n_embd), _normal(shape.n_embd)
    yield "ssm_conv1d.weight", (2 * inner, _CONV), _normal(_CONV)
    yield "ssm_dt.bias", (heads,), ("normal", 0.02)
    yield "ssm_a", (heads,), ("decay", 1.0)
    yield "ssm_beta.weight", (heads, shape.n_embd), _normal(shape.n_embd)
    yield "ssm_alpha.weight", (heads, shape.n_embd), _normal(shape.n_embd)
    yield "ssm_norm.weight", (shape.n_state,), _ONE
    yield "ssm_out.weight", (shape.n_embd, inner), _normal(inner, 3 * quiet)


_ONE: Fill = ("constant", 1.0)
_FOCUS = 1.7  # spread of queries and keys: attention scores of spread 3, so that a few tokens stand out
_CONV = 4


def _normal(n_inputs: int, gain: float = 1.0) -> Fill:
    """Normal numbers that turn `n_inputs` inputs of spread 1 into outputs of spread `gain`."""
    return ("normal", gain * n_inputs**-0.5)
