"""Tiny projectors that libmtmd really loads: random weights, so every pixel changes what the model is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

Shapes = dict[str, tuple[int, ...]]  # in ggml's order
LAYERS, HEADS, WIDTH, HIDDEN = 2, 2, 32, 64


def _layers(letter: str) -> Shapes:
    found: Shapes = {}
    for il in range(LAYERS):
        at = f"{letter}.blk.{il}."
        names = {f"attn_{n}": (WIDTH, WIDTH) for n in ("q", "k", "v", "out")}
        names |= {"ffn_up": (WIDTH, HIDDEN), "ffn_down": (HIDDEN, WIDTH)}
        for name, ne in names.items():
            found[f"{at}{name}.weight"], found[f"{at}{name}.bias"] = ne, ne[1:]
        for norm in ("ln1", "ln2"):
            found[f"{at}{norm}.weight"] = found[f"{at}{norm}.bias"] = (WIDTH,)
    return found


def _linear(name: str, ins: int, outs: int) -> Shapes:
    return {f"{name}.weight": (ins, outs), f"{name}.bias": (outs,)}


def _write(path: Path, part: str, keys: dict[str, Any], tensors: Shapes, activation: str = "gelu") -> Path:
    writer = gguf.GGUFWriter(str(path), "clip")
    writer.add_bool(f"clip.has_{part}_encoder", True)
    writer.add_string("clip.projector_type", keys.pop("projector_type"))
    writer.add_bool(f"clip.use_{activation}", True)
    common = {"embedding_length": WIDTH, "feed_forward_length": HIDDEN, "attention.head_count": HEADS}
    for name, value in (common | {"block_count": LAYERS} | keys).items():
        key = f"clip.{part}.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    rng = np.random.default_rng(1)
    for name, ne in tensors.items():
        spread = 1.0 if "position" in name or "class" in name else (2.0 / ne[0]) ** 0.5
        data = rng.normal(0, spread, tuple(reversed(ne))).astype(np.float32)
        if "ln" in name or "norm" in name:
            data[:] = 1.0 if name.endswith("weight") else 0.0
        single = len(ne) == 1 or name.endswith(".bias") or "position" in name
        writer.add_tensor(name, data if single else data.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _image_keys(kind: str, side: int, patch: int, **more: Any) -> dict[str, Any]:
    return {
        "projector_type": kind, "image_size": side, "patch_size": patch, "projection_dim": 16,
        "attention.layer_norm_epsilon": 1e-6, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, **more,
    }  # fmt: skip


_POST: Shapes = {"v.post_ln.weight": (WIDTH,), "v.post_ln.bias": (WIDTH,)}


def write_llava(path: Path, n_embd: int) -> Path:
    """Every picture is 16 tokens."""
    tensors: Shapes = {
        "v.patch_embd.weight": (14, 14, 3, WIDTH), "v.position_embd.weight": (WIDTH, 17), "v.class_embd": (WIDTH,),
        "v.pre_ln.weight": (WIDTH,), "v.pre_ln.bias": (WIDTH,),
    }  # fmt: skip
    tensors |= _layers("v") | _linear("mm.0", WIDTH, n_embd) | _linear("mm.2", n_embd, n_embd)
    return _write(path, "vision", _image_keys("mlp", 56, 14), tensors)


def write_gemma3(path: Path, n_embd: int) -> Path:
    """Every picture is 16 tokens, which see each other (non-causal attention), between two of text."""
    tensors: Shapes = {
        "v.patch_embd.weight": (14, 14, 3, WIDTH), "v.patch_embd.bias": (WIDTH,),
        "v.position_embd.weight": (WIDTH, 256),
        "mm.input_projection.weight": (n_embd, WIDTH), "mm.soft_emb_norm.weight": (WIDTH,),
    }  # fmt: skip
    return _write(path, "vision", _image_keys("gemma3", 224, 14), tensors | _POST | _layers("v"))


def write_qwen2vl(path: Path, n_embd: int) -> Path:
    """One token for 28 x 28 pixels. Its positions have two dimensions (M-RoPE)."""
    tensors: Shapes = {
        "v.patch_embd.weight": (14, 14, 3, WIDTH), "v.patch_embd.weight.1": (14, 14, 3, WIDTH),
    }  # fmt: skip
    tensors |= _POST | _layers("v") | _linear("mm.0", 4 * WIDTH, 4 * WIDTH) | _linear("mm.2", 4 * WIDTH, n_embd)
    return _write(path, "vision", _image_keys("qwen2vl_merger", 56, 14), tensors)


def write_ultravox(path: Path, n_embd: int) -> Path:
    """Every half minute of sound is 75 tokens."""
    keys = {
        "projector_type": "ultravox", "num_mel_bins": 80, "projection_dim": n_embd,
        "attention.layer_norm_epsilon": 1e-5, "projector.stack_factor": 20,
    }  # fmt: skip
    tensors: Shapes = {
        "a.position_embd.weight": (WIDTH, 1500), "a.conv1d.1.weight": (3, 80, WIDTH), "a.conv1d.1.bias": (1, WIDTH),
        "a.conv1d.2.weight": (3, WIDTH, WIDTH), "a.conv1d.2.bias": (1, WIDTH), "a.post_ln.weight": (WIDTH,),
        "a.post_ln.bias": (WIDTH,), "mm.a.mlp.1.weight": (20 * WIDTH, 64), "mm.a.mlp.2.weight": (32, n_embd),
        "mm.a.norm_pre.weight": (20 * WIDTH,), "mm.a.norm_mid.weight": (32,),
    }  # fmt: skip
    layers = {name: ne for name, ne in _layers("a").items() if not name.endswith("attn_k.bias")}
    return _write(path, "audio", keys, tensors | layers)


def write_as_qwen2vl(path: Path, llama: Path) -> Path:
    """A sample model of the kind llama, written again as one whose positions have two dimensions."""
    source = gguf.GGUFReader(llama)
    writer = gguf.GGUFWriter(str(path), "qwen2vl")
    for name, each in source.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = each.types[0]
        inner = each.types[1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name.replace("llama.", "qwen2vl."), each.contents(), kind, sub_type=inner)
    writer.add_array("qwen2vl.rope.dimension_sections", [4, 6, 6, 0])
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data)
        for letter in "qkv":
            if tensor.name.endswith(f"attn_{letter}.weight"):
                n_out = int(tensor.shape[1])
                writer.add_tensor(tensor.name.replace("weight", "bias"), np.zeros(n_out, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
