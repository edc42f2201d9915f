"""Multimodal projectors: weights to the byte, and a bound on compute buffers, against libmtmd."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from gguf_file import Gguf
from gguf_shapes import SMALL, write_model

from scheduler.costs import projector as projector_module
from scheduler.costs.projector import read_projector
from scheduler.errors import InvalidGGUF

Shapes = dict[str, tuple[int, ...]]
LAYERS, HEADS, E, FF, OUT = 3, 4, 256, 768, 512


def block(letter: str, *, fused: bool = False, gate: bool = False, bias: bool = True) -> Shapes:
    found: Shapes = {}
    for il in range(LAYERS):
        at = f"{letter}.blk.{il}."
        names = {"attn_qkv": (E, 3 * E)} if fused else {f"attn_{n}": (E, E) for n in "qkv"}
        names |= {"attn_out": (E, E), "ffn_up": (E, FF), "ffn_down": (FF, E)}
        names |= {"ffn_gate": (E, FF)} if gate else {}
        for name, ne in names.items():
            found[f"{at}{name}.weight"] = ne
            if bias:
                found[f"{at}{name}.bias"] = ne[1:]
        for norm in ("ln1", "ln2"):
            found[f"{at}{norm}.weight"] = (E,)
            if bias:
                found[f"{at}{norm}.bias"] = (E,)
    return found


def linear(name: str, ins: int, outs: int) -> Shapes:
    return {f"{name}.weight": (ins, outs), f"{name}.bias": (outs,)}


def image_file(kind: str, size: int, patch: int, tensors: Shapes, **keys: Any) -> Gguf:
    gguf = Gguf()
    gguf.set("general.architecture", "clip")
    gguf.set("clip.has_vision_encoder", True)
    gguf.set("clip.projector_type", kind)
    basics = {
        "image_size": size, "patch_size": patch, "embedding_length": E, "feed_forward_length": FF,
        "attention.head_count": HEADS, "block_count": LAYERS, "projection_dim": OUT,
        "attention.layer_norm_epsilon": 1e-6, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    for key, value in (basics | {name.replace("__", "."): value for name, value in keys.items()}).items():
        gguf.set(f"clip.vision.{key}", value)
    gguf.set("clip.use_gelu", True)
    return with_tensors(gguf, tensors)


def with_tensors(gguf: Gguf, tensors: Shapes) -> Gguf:
    gguf.tensors = [(name, ne, kind_of(name, ne)) for name, ne in tensors.items()]
    return gguf


def kind_of(name: str, ne: tuple[int, ...]) -> str:
    return "f32" if len(ne) == 1 or "position_embd" in name or name.endswith(".bias") else "f16"


def patches(patch: int, positions: int = 0, bias: bool = True) -> Shapes:
    found: Shapes = {"v.patch_embd.weight": (patch, patch, 3, E)}
    found |= {"v.patch_embd.bias": (E,)} if bias else {}
    return found | ({"v.position_embd.weight": (E, positions)} if positions else {})


POST: Shapes = {"v.post_ln.weight": (E,), "v.post_ln.bias": (E,)}


def llava() -> Gguf:
    tensors = patches(14, 577, bias=False) | {"v.class_embd": (E,), "v.pre_ln.weight": (E,), "v.pre_ln.bias": (E,)}
    return image_file("mlp", 336, 14, tensors | block("v") | linear("mm.0", E, OUT) | linear("mm.2", OUT, OUT))


def gemma3() -> Gguf:
    ends: Shapes = {"mm.input_projection.weight": (OUT, E), "mm.soft_emb_norm.weight": (E,)}
    return image_file("gemma3", 448, 14, patches(14, 1024) | POST | block("v") | ends)


def qwen25vl() -> Gguf:
    tensors = patches(14, bias=False) | {"v.patch_embd.weight.1": (14, 14, 3, E), "v.post_ln.weight": (E,)}
    tensors |= {name: ne for name, ne in block("v", gate=True).items() if ".ln" not in name or "weight" in name}
    tensors |= linear("mm.0", 4 * E, 4 * E) | linear("mm.2", 4 * E, OUT)
    gguf = image_file("qwen2.5vl_merger", 560, 14, tensors, n_wa_pattern=2)
    del gguf.metadata["clip.use_gelu"]
    gguf.set("clip.use_silu", True)
    return gguf


def qwen3vl() -> Gguf:
    tensors = patches(16, 2304) | {"v.patch_embd.weight.1": (16, 16, 3, E)} | POST | block("v", fused=True)
    tensors |= linear("mm.0", 4 * E, 4 * E) | linear("mm.2", 4 * E, OUT)
    tensors |= {"v.deepstack.1.norm.weight": (4 * E,), "v.deepstack.1.norm.bias": (4 * E,)}
    tensors |= linear("v.deepstack.1.fc1", 4 * E, 4 * E) | linear("v.deepstack.1.fc2", 4 * E, OUT)
    return image_file("qwen3vl_merger", 768, 16, tensors, spatial_merge_size=2)


def idefics3() -> Gguf:
    tensors = patches(16, 256) | POST | block("v") | {"mm.model.fc.weight": (16 * E, OUT)}
    return image_file("idefics3", 256, 16, tensors, projector__scale_factor=4)


def pixtral() -> Gguf:
    tensors = patches(16, bias=False) | {"v.pre_ln.weight": (E,), "v.token_embd.img_break": (OUT,)}
    tensors |= block("v", gate=True, bias=False) | linear("mm.1", E, OUT) | linear("mm.2", OUT, OUT)
    gguf = image_file("pixtral", 512, 16, tensors)
    del gguf.metadata["clip.use_gelu"]
    gguf.set("clip.use_silu", True)
    return gguf


def ultravox() -> Gguf:
    gguf = Gguf()
    gguf.set("general.architecture", "clip")
    gguf.set("clip.has_audio_encoder", True)
    gguf.set("clip.projector_type", "ultravox")
    keys = {
        "num_mel_bins": 80, "embedding_length": E, "feed_forward_length": FF, "attention.head_count": HEADS,
        "block_count": LAYERS, "projection_dim": OUT, "attention.layer_norm_epsilon": 1e-5, "projector.stack_factor": 8,
    }  # fmt: skip
    for key, value in keys.items():
        gguf.set(f"clip.audio.{key}", value)
    tensors: Shapes = {
        "a.position_embd.weight": (E, 1500), "a.conv1d.1.weight": (3, 80, E), "a.conv1d.1.bias": (1, E),
        "a.conv1d.2.weight": (3, E, E), "a.conv1d.2.bias": (1, E), "a.post_ln.weight": (E,), "a.post_ln.bias": (E,),
        "mm.a.mlp.1.weight": (8 * E, 1024), "mm.a.mlp.2.weight": (512, OUT), "mm.a.norm_pre.weight": (8 * E,),
        "mm.a.norm_mid.weight": (512,),
    }  # fmt: skip
    return with_tensors(gguf, tensors | {n: ne for n, ne in block("a").items() if not n.endswith("attn_k.bias")})


MADE: dict[str, Callable[[], Gguf]] = {
    "llava": llava, "gemma3": gemma3, "qwen2.5vl": qwen25vl, "qwen3vl": qwen3vl, "idefics3": idefics3,
    "pixtral": pixtral, "ultravox": ultravox,
}  # fmt: skip


def truth(paths: list[Path], flash_attn: bool) -> list[int | None]:
    program = Path(__file__).with_name("mtmd_truth.py")
    command = [sys.executable, program, "on" if flash_attn else "off", *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("ANSWERS "):
            answers: list[int | None] = json.loads(line.removeprefix("ANSWERS "))
            return answers
    raise AssertionError(f"libmtmd ended with {done.returncode}: {done.stderr[-800:]}")


@pytest.mark.llama
@pytest.mark.parametrize("flash_attn", [False, True])
def test_projectors_take_no_more_than_predicted(flash_attn: bool, tmp_path: Path) -> None:
    paths = {name: make().write(tmp_path / f"{name}.gguf") for name, make in MADE.items()}
    answers = truth(list(paths.values()), flash_attn)
    for (name, path), there in zip(paths.items(), answers, strict=True):
        assert there is not None, f"libmtmd refuses {name}"
        projector = read_projector(path)
        weights = sum(size_of(tensor) for tensor in MADE[name]().tensors)  # libmtmd counts them without padding
        ours = projector.on_host(flash_attn=flash_attn)
        assert weights <= ours.weights_bytes <= weights + 31 * len(MADE[name]().tensors)
        assert there - weights <= ours.compute_bytes <= 2.2 * (there - weights), name


def size_of(tensor: tuple[str, tuple[int, ...], str]) -> int:
    total = 4 if tensor[2] == "f32" else 2
    for n in tensor[1]:
        total *= n
    return total


def test_where_a_projector_lies(tmp_path: Path) -> None:
    projector = read_projector(gemma3().write(tmp_path / "mmproj.gguf"))
    there, here = projector.on_device("cuda"), projector.on_host()
    assert there.weights_bytes >= here.weights_bytes and there.compute_bytes == here.compute_bytes
    assert 0 < projector.beside_device().compute_bytes < here.compute_bytes
    assert projector.on_host(flash_attn=True).compute_bytes < here.compute_bytes


def test_a_file_with_eyes_and_ears_loads_what_they_share_twice(tmp_path: Path) -> None:
    both, eyes, ears = Gguf(), qwen25vl(), ultravox()
    for part in (eyes, ears):
        both.metadata |= part.metadata
    both.set("clip.vision.projector_type", "qwen2.5vl_merger")
    both.set("clip.audio.projector_type", "ultravox")
    del both.metadata["clip.projector_type"]
    both.tensors = eyes.tensors + ears.tensors
    projector = read_projector(both.write(tmp_path / "omni.gguf"))
    apart = [read_projector(part.write(tmp_path / f"{i}.gguf")) for i, part in enumerate((eyes, ears))]
    assert [encoder.is_audio for encoder in projector.encoders] == [False, True]
    twice = 2 * 2 * 14 * 14 * 3 * E  # two kernels of F16
    assert projector.weights.plain == sum(each.weights.plain for each in apart) + twice


def test_kinds_that_were_not_looked_at_get_a_wide_bound(tmp_path: Path) -> None:
    gguf = gemma3()
    gguf.set("clip.projector_type", "something-new")
    known, new = (read_projector(g.write(tmp_path / f"{n}.gguf")) for n, g in enumerate((gemma3(), gguf)))
    assert not new.encoders[0].is_bounded
    assert new.on_host().compute_bytes > 2 * known.on_host().compute_bytes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g: g.metadata.pop("clip.has_vision_encoder"), "neither an encoder of images nor one of sounds"),
        (lambda g: g.metadata.pop("clip.projector_type"), "projector_type is missing"),
        (lambda g: g.set("clip.vision.patch_size", 0), "no positions"),
        (lambda g: g.set("clip.vision.image_size", 1 << 30), "not a sensible whole number"),
        (lambda g: g.set("clip.vision.attention.head_count", "four"), "not a sensible whole number"),
    ],
)
def test_files_that_are_no_projectors(change: Callable[[Gguf], object], words: str, tmp_path: Path) -> None:
    gguf = gemma3()
    change(gguf)
    with pytest.raises(InvalidGGUF, match=words):
        read_projector(gguf.write(tmp_path / "mmproj.gguf"))


def test_a_model_is_no_projector(tmp_path: Path) -> None:
    with pytest.raises(InvalidGGUF, match="not a multimodal projector"):
        read_projector(write_model(SMALL["llama"], tmp_path / "model.gguf"))


@pytest.mark.parametrize("make", [qwen25vl, qwen3vl, pixtral])
def test_larger_images_count_as_a_larger_warm_up(
    make: Callable[[], Gguf], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make().write(tmp_path / "mmproj.gguf")
    usual = read_projector(path)
    (eyes,) = usual.encoders
    monkeypatch.setitem(projector_module._PATCHES_A_SIDE, eyes.kind, 64)
    wanted = read_projector(path)
    monkeypatch.undo()
    larger = usual.taking(64 * 64)
    assert asdict(larger.encoders[0]) == asdict(wanted.encoders[0])
    assert larger.on_host().compute_bytes == wanted.on_host().compute_bytes > usual.on_host().compute_bytes
    assert usual.taking(100).on_host() == usual.taking(0).on_host() == usual.on_host()


def test_images_whose_size_is_in_the_file_stay_as_they_are(tmp_path: Path) -> None:
    for make in (gemma3, llava, ultravox):
        projector = read_projector(make().write(tmp_path / "mmproj.gguf"))
        assert projector.taking(128 * 128).on_host() == projector.on_host()
        assert projector.unsuited(0, 128 * 128)
