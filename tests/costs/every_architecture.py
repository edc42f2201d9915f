"""A program that makes a model of every architecture that the installed llama.cpp knows, tiny ones or `--wide` ones.

llama.cpp builds models from metadata alone (`llama_model_init_from_user`) and names every tensor it wants, optional
ones too: so no list of tensors is kept here, only hyper-parameters that satisfy every `load_arch_hparams`. What each
needs was learned from tests/test-llama-archs.cpp of llama.cpp.

    every_architecture.py [--wide] DIRECTORY [ARCHITECTURE ...]

writes `<architecture>-dense.gguf` or `-moe.gguf` (headers on sparse files) and prints one JSON line per model:
`{"arch", "moe", "path"}`, or `{"arch", "moe", "error"}` with llama.cpp's last words where it has no such model. Each
model is made in a process of its own, because llama.cpp ends the process over what it does not like. Wide models have
the widths, the vocabulary and the quantized weights of a small real one, so that what is predicted for them can be
judged as a share of the memory; they are too big to be loaded for real.
"""

from __future__ import annotations

import argparse
import ctypes as c
import json
import os
import re
from pathlib import Path
from typing import Any

import llama_cpp
from gguf_file import ARRAY, U64, Gguf, add_vocabulary

from scheduler.costs.families import ROWS
from scheduler.costs.ggml_types import TYPES

LIBRARY = llama_cpp.llama_cpp._lib
N_CTX, N_LAYER = 4096, 4

_LATENT = {name for name, row in ROWS.items() if row.latent}
_HYBRID_BY_HEADS = {name for name, row in ROWS.items() if row.family in ("by heads", "by width")}
_LISTED_WINDOWS = {name for name, row in ROWS.items() if row.window and row.window.period is None}
_DELTA_NETS = {name for name, row in ROWS.items() if row.family == "by interval" and row.state == "grouped ssm"}
_MANY_KV_HEADS = frozenset(
    """
    rwkv6 rwkv7 arwkv7 rwkv6qwen2 phi2 mpt gpt2 bloom baichuan qwen plm deepseek2-ocr minicpm3 t5 t5encoder dots1 olmoe
    jina-bert-v2
    """.split()
)
"""Architectures without grouped heads."""
_ONE_WIDTH = frozenset("phimoe dbrx olmoe arctic hunyuan-moe minimax-m2 minimax-01".split())
"""Architectures whose experts are as wide as other feed-forward parts."""
_DENSE_TOO = frozenset("llama refact minicpm granite granitemoe mistral3 llama-embed gemma4".split())


class Tensor(c.Structure):
    """The head of `struct ggml_tensor`."""

    _fields_ = [("type", c.c_int), ("buffer", c.c_void_p), ("ne", c.c_int64 * 4)]


def function(name: str, result: Any, *arguments: Any) -> Any:
    found = LIBRARY[name]
    found.restype, found.argtypes = result, list(arguments)
    return found


def known_architectures() -> list[str]:
    """Every architecture's name, in llama.cpp's order."""
    name_of = function("_Z13llm_arch_name8llm_arch", c.c_char_p, c.c_int)
    names: list[str] = []
    while (name := name_of(len(names)).decode()) != "(unknown)":
        names.append(name)
    return names


def widths(arch: str, wide: bool) -> dict[str, int]:
    if wide:
        depths = {"gemma3n": 30, "eagle3": 1, "hrm_text": 24, "nanbeige": N_LAYER, "wavtokenizer-dec": 6}
        return {"n_embd": 2048, "n_head": 16, "n_ff": 5632, "n_layer": depths.get(arch, 12)}
    n_embd, n_head, n_ff, n_layer = 256, 4, 384, N_LAYER
    if arch in _LATENT:
        n_embd, n_head, n_ff = 128, 1, 192
    elif arch == "gemma3n":
        n_embd, n_head, n_ff, n_layer = 64, 1, 96, 23
    elif arch == "gemma4":
        n_embd, n_head, n_ff, n_layer = 128, 2, 192, 5
    elif arch == "gemma4-assistant":
        n_embd, n_head, n_ff = 64, 2, 96
    elif arch == "deepseek4":
        n_embd, n_head, n_ff = 512, 8, 1024
    elif arch in ("nemotron_h", "nemotron_h_moe", "hrm_text", "wavtokenizer-dec"):
        n_layer = 6
    elif arch == "eagle3":
        n_layer = 1
    return {"n_embd": n_embd, "n_head": n_head, "n_ff": n_ff, "n_layer": n_layer}


def hyper_parameters(arch: str, moe: bool, wide: bool) -> dict[str, Any]:
    """Keys without the architecture's prefix."""
    w = widths(arch, wide)
    n_embd, n_head, n_ff, n_layer = w["n_embd"], w["n_head"], w["n_ff"], w["n_layer"]
    head = n_embd // n_head
    by_turns = [il % 2 for il in range(n_layer)]
    keys: dict[str, Any] = {
        "vocab_size": vocabulary(arch, wide), "context_length": N_CTX, "embedding_length": n_embd,
        "features_length": n_embd, "block_count": n_layer, "leading_dense_block_count": 1, "feed_forward_length": n_ff,
        "use_parallel_residual": False, "logit_scale": 1.0, "time_mix_extra_dim": 64, "time_decay_extra_dim": 128,
        "full_attention_interval": 2, "attention.head_count": n_head, "attention.head_count_kv": n_head,
        "attention.max_alibi_bias": 8.0, "attention.clamp_kqv": 1.0, "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5, "attention.group_norm_epsilon": 1e-5,
        "attention.group_norm_groups": 8,
        "attention.q_lora_rank": 512, "attention.kv_lora_rank": 512, "attention.relative_buckets_count": 8,
        "attention.sliding_window": 256, "attention.indexer.head_count": 64, "attention.indexer.key_length": 128,
        "attention.indexer.top_k": 2048, "attention.indexer.block_size": 4, "attention.indexer.kpool": 4,
        "attention.indexer.kpool_select_tail": True, "attention.indexer.local_blocks": 1,
        "rope.dimension_sections": [head // 4] * 4, "posnet.embedding_length": n_embd, "posnet.block_count": n_layer,
        "convnext.embedding_length": n_embd, "convnext.block_count": n_layer, "ssm.inner_size": 2 * n_embd,
        "ssm.conv_kernel": 4, "ssm.state_size": 128, "ssm.time_step_rank": n_head, "ssm.group_count": 2,
        "kda.head_dim": 128, "kda.safe_gate": True, "kda.gate_lower_bound": -5.0, "wkv.head_size": head,
        "shortconv.l_cache": 3, "residual_scale": 3.5, "attn_res.block_size": 12, "activation.situ_beta": 4.0,
        "activation.situ_linear_beta": 25.0, "attention.decay_lora_rank": 64, "attention.iclr_lora_rank": 64,
        "attention.value_residual_mix_lora_rank": 32, "attention.gate_lora_rank": 128, "moe_every_n_layers": 2,
        "attention.sliding_window_pattern": by_turns if arch in _LISTED_WINDOWS else 2,
    }  # fmt: skip
    if moe:
        keys |= {
            "expert_feed_forward_length": n_ff, "expert_shared_feed_forward_length": n_ff // 2,
            "expert_latent_length": n_ff, "moe_latent_size": 0, "interleave_moe_layer_step": 2, "expert_count": 4,
            "expert_used_count": 2, "expert_shared_count": 1, "expert_gating_func": 4 if arch == "deepseek4" else 2,
            "expert_group_scale": 1.0, "experts_per_group": 1, "expert_weights_scale": 1.0, "expert_weights_norm": True,
            "expert_chunk_feed_forward_length": n_ff // 2,
        }  # fmt: skip
    if arch in _HYBRID_BY_HEADS:
        heads = [0 if il % 3 == 1 else n_head for il in range(n_layer)]
        keys["attention.head_count_kv"] = heads
        if arch != "glm5-next":
            keys["attention.head_count"] = heads
    if arch in ("nemotron_h", "nemotron_h_moe"):
        keys["feed_forward_length"] = [n_ff if il % 3 == 2 else 0 for il in range(n_layer)]
    if arch in _LATENT:
        keys |= {
            "attention.key_length": 512 if arch == "glm5-next" else 576, "attention.value_length": 512,
            "rope.dimension_count": 0 if arch == "glm5-next" else 64, "attention.key_length_mla": 192,
            "attention.value_length_mla": 128,
        }  # fmt: skip
    if arch in ("dots3note", "hy_v4"):
        keys["attention.indexer.types"] = [1 - odd for odd in by_turns]
    if arch in _DELTA_NETS:
        keys["ssm.inner_size"] = 512
    if arch in ("qwen4exp", "glm5-next"):
        keys |= _embeddings_per_layer(n_embd, n_layer)
    keys |= _SPECIAL.get(arch, {})
    return keys | _widened(arch, moe, keys) if wide else keys


def _widened(arch: str, moe: bool, keys: dict[str, Any]) -> dict[str, Any]:
    """What a wide model has otherwise."""
    changed: dict[str, Any] = {"context_length": 32768, "attention.sliding_window": 1024}
    n_layer, kv_heads = keys["block_count"], keys["attention.head_count_kv"]
    if arch not in _MANY_KV_HEADS:
        most = 1 if arch in _LATENT else 4
        per_layer = isinstance(kv_heads, list)
        changed["attention.head_count_kv"] = [min(n, most) for n in kv_heads] if per_layer else min(kv_heads, most)
    if moe:
        changed |= {
            "expert_count": 16, "expert_used_count": 6, "expert_feed_forward_length": 1408,
            "expert_shared_feed_forward_length": 2816, "expert_latent_length": 1408,
            "expert_chunk_feed_forward_length": 704,
        }  # fmt: skip
        if arch in _ONE_WIDTH:
            changed["feed_forward_length"] = 1408
    if arch in _DELTA_NETS:
        changed |= {"ssm.inner_size": 2048, "ssm.time_step_rank": 16, "ssm.group_count": 16}
    special: dict[str, dict[str, Any]] = {
        "hrm_text": {"hrm.layers_per_stack": 4},
        "t5": {"decoder_block_count": n_layer},
        "deepseek4": {
            "attention.key_length": 128, "attention.value_length": 128, "rope.dimension_count": 64,
            "attention.compress_ratios": [0, 0] + [4, 128] * 5,
        },
    }  # fmt: skip
    return changed | special.get(arch, {})


def _embeddings_per_layer(n_embd: int, n_layer: int) -> dict[str, Any]:
    heads = 4
    return {
        "hyper_connection.count": 4, "hyper_connection.sinkhorn_iterations": 2, "hyper_connection.epsilon": 1e-6,
        "hyper_connection.low_rank": 8, "attention.compress_ratios": [4] * n_layer, "ple.layers": [0],
        "ple.ngram_size": 3, "ple.heads_per_ngram": 2, "ple.conv_kernel": 4, "ple.eos_token_id": 0,
        "embedding_length_per_layer_input": n_embd // heads, "ple.layer_multipliers": (1, 3, 5),
        "ple.head_offsets": tuple(512 * h for h in range(heads)), "ple.head_vocab_sizes": (512,) * heads,
    }  # fmt: skip


_ABSENT = {"rwkv6qwen2": re.compile(r"blk\.\d+\.time_mix_first.*"), "nanbeige": re.compile(rf"blk\.[{N_LAYER}-9]\..*")}
"""Optional tensors that no file has, because they tell another family of models, or belong to layers run again."""


def vocabulary(arch: str, wide: bool) -> int:
    """Tokens: some architectures reckon with more than a few."""
    return 64_000 if wide else {"chameleon": 10240, "qwen3tts": 3072}.get(arch, 512)


_SPECIAL: dict[str, dict[str, Any]] = {
    "dots3note": {
        "attention.kv_lora_rank_swa": 512, "attention.key_length_swa": 576, "attention.value_length_swa": 512,
        "attention.key_length_mla_swa": 192, "attention.value_length_mla_swa": 128, "rope.freq_base_swa": 1e4,
    },
    "gemma4": {
        "embedding_length_per_layer_input": 64, "attention.shared_kv_layers": 0, "attention.key_length_swa": 64,
        "attention.value_length_swa": 64, "rope.freq_base_swa": 1e4,
    },
    "gemma4-assistant": {
        "embedding_length_out": 128, "attention.key_length": 64, "attention.value_length": 64,
        "attention.key_length_swa": 64, "attention.value_length_swa": 64, "nextn_predict_layers": N_LAYER,
    },
    "deepseek4": {
        "attention.head_count_kv": 1, "attention.key_length": 64, "attention.value_length": 64,
        "rope.dimension_count": 32, "attention.q_lora_rank": 64, "attention.output_group_count": 8,
        "attention.output_lora_rank": 32, "attention.compress_ratios": [0, 0, 4, 128],
        "attention.compress_rope_freq_base": 160000.0,
        "hyper_connection.count": 4, "hyper_connection.sinkhorn_iterations": 2, "hyper_connection.epsilon": 1e-6,
        "hash_layer_count": 0, "swiglu_clamp_exp": 10.0,
    },
    "hy_v4": {
        "hyper_connection.count": 4, "hyper_connection.epsilon": 1e-6, "hyper_connection.magnitude": 2.0,
        "swiglu_clamp_exp": 10.0,
    },
    "qwen4exp": {"attention.indexer.key_length": 64},
    "minimax-m3": {"rope.dimension_count": 64, "attention.indexer.head_count": 4},
    "hrm_text": {"hrm.layers_per_stack": 1, "hrm.h_cycles": 2, "hrm.l_cycles": 2},
    "maple": {"swiglu_clamp_exp": 7.0},
    "ernie4_5-moe": {"interleave_moe_layer_step": 1},
    "plamo2": {"ssm.group_count": 0},
    "plm": {"attention.key_length": 96, "attention.value_length": 64, "rope.dimension_count": 32},
    "arwkv7": {"token_shift_count": 1},
    "rwkv6qwen2": {"token_shift_count": 1},
    "eagle3": {"target_layers": [1, 2, 3], "target_hidden_size": 256},
    "dflash": {"target_layers": [1, 2, 3], "block_size": 16},
    "graniteswitch": {
        "adapters.count": 2, "adapters.lora_rank": 8, "adapters.token_ids_activate": [7, 8],
        "adapters.token_ids_substitute": [5, 6],
    },
    "bailingmoe3": {"rope.dimension_sections": [8, 12, 12, 0]},
    "nanbeige": {"num_loops": 2},
    "t5": {"decoder_start_token_id": 0, "decoder_block_count": N_LAYER},
}  # fmt: skip


def header(arch: str, moe: bool, wide: bool) -> Gguf:
    """The model without its tensors."""
    gguf = Gguf()
    gguf.set("general.architecture", arch)
    for key, value in hyper_parameters(arch, moe, wide).items():
        if isinstance(value, tuple):
            gguf.metadata[f"{arch}.{key}"] = (ARRAY, (U64, value))
        else:
            gguf.set(f"{arch}.{key}", value)
    for part in ("alpha_n", "alpha_p", "beta", "eps"):
        gguf.set(f"xielu.{part}", 1.0)
    gguf.set("tokenizer.ggml.token_type_count", 2)
    add_vocabulary(gguf, vocabulary(arch, wide))
    return gguf


def assistant_tensors(wide: bool) -> list[tuple[str, tuple[int, ...], str]]:
    """Those of gemma4-assistant, which llama.cpp cannot make up: it asks for two that it does not load."""
    w = widths("gemma4-assistant", wide)
    e, ff, heads = w["n_embd"], w["n_ff"], w["n_head"]
    beside, head = (_SPECIAL["gemma4-assistant"][key] for key in ("embedding_length_out", "attention.key_length"))
    found: list[tuple[str, tuple[int, ...], str]] = [
        ("token_embd.weight", (e, vocabulary("gemma4-assistant", wide)), "f16"), ("output_norm.weight", (e,), "f32"),
        ("nextn.post_projection.weight", (e, beside), "f16"), ("nextn.pre_projection.weight", (2 * beside, e), "f16"),
        ("rope_freqs.weight", (head // 2,), "f32"),
    ]  # fmt: skip
    for il in range(w["n_layer"]):
        norms = [(f"{norm}.weight", (e,)) for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")]
        norms += [("attn_q_norm.weight", (head,)), ("layer_output_scale.weight", (1,))]
        found += [(f"blk.{il}.{name}", ne, "f32") for name, ne in norms]
        matrices = [("attn_q", (e, head * heads)), ("attn_output", (head * heads, e))]
        matrices += [("ffn_gate", (e, ff)), ("ffn_up", (e, ff)), ("ffn_down", (ff, e))]
        found += [(f"blk.{il}.{name}.weight", ne, "f16") for name, ne in matrices]
    return found


def make(arch: str, moe: bool, wide: bool, path: Path) -> None:
    """Ask llama.cpp which tensors the model has, and write it."""
    gguf = header(arch, moe, wide)
    if arch == "gemma4-assistant":
        gguf.tensors = assistant_tensors(wide)
        gguf.write(path)
        os._exit(0)
    if arch == "wavtokenizer-dec":  # convolutions want F16 weights, which their entry in the file says
        for il in range(widths(arch, wide)["n_layer"]):
            names = (f"conv{il}d", f"posnet.{il}.conv1", f"posnet.{il}.conv2", f"convnext.{il}.dw")
            gguf.tensors += [(f"{name}.weight", (1,), "f16") for name in names]
    gguf.write(path)
    init = function("gguf_init_from_file", c.c_void_p, c.c_char_p, GgufParams)
    metadata = init(str(path).encode(), GgufParams(True, None))
    if not metadata:
        raise SystemExit("the metadata is not a GGUF")
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    name_of = function("ggml_get_name", c.c_char_p, c.c_void_p)

    def note(address: int, _: object) -> None:
        tensor = Tensor.from_address(address)
        ne = list(tensor.ne)
        while len(ne) > 1 and ne[-1] == 1:
            ne.pop()
        found[name_of(address).decode()] = (tuple(ne), TYPES[tensor.type].name)

    callback = c.CFUNCTYPE(None, c.c_void_p, c.c_void_p)(note)
    load = function("llama_model_init_from_user", c.c_void_p, c.c_void_p, type(callback), c.c_void_p, MODEL_PARAMS)
    llama_cpp.llama_backend_init()
    model = load(metadata, callback, None, llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit("llama.cpp does not load it")
    absent = _ABSENT.get(arch)
    gguf.tensors = [
        (name, ne, "q4_K" if wide and _is_quantized(name, ne, kind) else kind)
        for name, (ne, kind) in found.items()
        if not (absent and absent.fullmatch(name))
    ]
    gguf.write(path)
    os._exit(0)  # nothing to put away


def _is_quantized(name: str, ne: tuple[int, ...], kind: str) -> bool:
    small = re.search(r"norm|conv1d|ssm_a|ssm_d|position|gate_inp", name)
    return kind == "f32" and len(ne) > 1 and ne[0] % 256 == 0 and not small


class GgufParams(c.Structure):
    """`struct gguf_init_params`."""

    _fields_ = [("no_alloc", c.c_bool), ("context", c.c_void_p)]


MODEL_PARAMS = llama_cpp.llama_model_params


def attempt(arch: str, moe: bool, wide: bool, directory: Path) -> dict[str, Any]:
    """Make the model in a child of this process, which has llama_cpp loaded already."""
    path = directory / f"{arch}-{'moe' if moe else 'dense'}.gguf"
    report = directory / "report"
    child = os.fork()
    if child == 0:
        with report.open("w") as words:
            os.dup2(words.fileno(), 1)
            os.dup2(words.fileno(), 2)
            try:
                make(arch, moe, wide, path)
            except SystemExit as error:
                print(error, flush=True)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) == 0:
        return {"arch": arch, "moe": moe, "path": str(path)}
    path.unlink(missing_ok=True)
    lines = [
        line for line in report.read_text(errors="replace").splitlines() if not line.startswith(("print_info", "#"))
    ]
    return {"arch": arch, "moe": moe, "error": "\n".join(lines[-6:])}


def routes(path: Path) -> bool:
    """Whether the model in the file has experts."""
    with path.open("rb") as file:
        return b"exps." in file.read(8 << 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("directory", type=Path)
    parser.add_argument("architectures", nargs="*")
    asked = parser.parse_args()
    for arch in asked.architectures or known_architectures():
        sparse = attempt(arch, True, asked.wide, asked.directory)
        models = [sparse] if "path" in sparse and routes(Path(sparse["path"])) else []
        if not models or arch in _DENSE_TOO:
            models.append(attempt(arch, False, asked.wide, asked.directory))
        for model in models:
            print(json.dumps(model), flush=True)


if __name__ == "__main__":
    main()
