"""LoRA adapters: what they add to a model, against llama.cpp, and which ones are refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from comparison import Case, ask, on_devices
from gguf_file import Gguf
from gguf_shapes import SMALL, Spec, tensors, write_model

from scheduler.costs.adapter import adapted, read_adapter
from scheduler.costs.footprint import computes_exactly, footprint
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.host import host_memory
from scheduler.costs.params import ContextParams, DeviceSpec, Layout
from scheduler.costs.shape import read_shape
from scheduler.errors import InvalidGGUF, Rejected

ALL_LINEAR = r"attn_(q|k|v|output)\.weight|ffn_(up|gate|down)(_exps)?\.weight"
CONTEXTS = [ContextParams(n_ctx=1024), ContextParams(n_ctx=2048, n_ubatch=64, n_seq_max=2, flash_attn="off")]


def adapter_file(spec: Spec, rank: int, pattern: str = ALL_LINEAR) -> Gguf:
    """An adapter for the weights of `spec` whose names match."""
    gguf = Gguf()
    gguf.set("general.type", "adapter")
    gguf.set("general.architecture", spec.arch)
    gguf.set("adapter.type", "lora")
    gguf.set("adapter.lora.alpha", 16.0)
    for name, ne in tensors(spec):
        if re.search(pattern, name):
            inner = (ne[1], ne[0]) if name == "token_embd.weight" else (ne[0], ne[1])
            gguf.tensors.append((f"{name}.lora_a", (inner[0], rank, *ne[2:]), "f16"))
            gguf.tensors.append((f"{name}.lora_b", (rank, inner[1], *ne[2:]), "f32"))
            if name == "token_embd.weight":
                gguf.tensors[-2:] = [(f"{name}.lora_a", (rank, ne[1]), "f16"), (f"{name}.lora_b", (rank, ne[0]), "f32")]
    return gguf


MODELS = {
    "llama": (replace(SMALL["llama"], n_ff=512), ALL_LINEAR, (16,)),
    "embedding": (SMALL["llama"], r"token_embd|^output\.weight|attn_q\.", (8,)),
    "biases": (SMALL["qwen2"], ALL_LINEAR, (32,)),
    "experts": (SMALL["qwen3moe"], ALL_LINEAR, (8,)),
    "hybrid": (SMALL["granitehybrid"], ALL_LINEAR + r"|ssm_(in|out)\.weight", (16,)),
    "latent": (SMALL["deepseek2"], r"attn_(q_b|kv_a_mqa|output)\.weight|ffn_down\.weight|^output\.weight", (16,)),
    "two": (SMALL["gemma3"], ALL_LINEAR, (16, 16)),
}


@pytest.mark.llama
@pytest.mark.parametrize("devices", [0, 2])
def test_adapted_models_take_what_is_predicted(devices: int, tmp_path: Path) -> None:
    paths = {name: write_model(spec, tmp_path / f"{name}.gguf") for name, (spec, _, _) in MODELS.items()}
    adapters = {
        name: [adapter_file(spec, rank, pattern).write(tmp_path / f"{name}-{no}.lora") for no, rank in enumerate(ranks)]
        for name, (spec, pattern, ranks) in MODELS.items()
    }
    layouts = [on_devices(1, 1), Layout(on_devices(1, 1).devices, 3, (2, 1))] if devices else [Layout()]
    cases: list[Case] = [(name, layout, context) for name in MODELS for layout in layouts for context in CONTEXTS]
    plain = {name: read_shape(path) for name, path in paths.items()}
    shapes = {name: adapted(plain[name], [read_adapter(path) for path in adapters[name]]) for name in MODELS}
    truths = ask(paths, cases, devices=devices, real=True, adapters=adapters)
    for (name, layout, context), truth in zip(cases, truths, strict=True):
        what, shape = f"{name}, {layout}, {context}", shapes[name]
        exact = computes_exactly(shape, CHECKED_BUILD)
        ours, before = (
            footprint(shape, layout, context, CHECKED_BUILD),
            footprint(plain[name], layout, context, CHECKED_BUILD),
        )
        got = {f"RPC{i}": pair for i, pair in enumerate(zip(ours.devices, before.devices, strict=True))}
        for place, (with_adapter, without) in (got | {"host": (ours.host, before.host)}).items():
            weights, cache, compute = truth["bytes"].get(place, [0, 0, 0])
            assert (without.weights_bytes, with_adapter.kv_bytes) == (weights, cache), what
            assert (with_adapter.compute_bytes == compute) if exact else (with_adapter.compute_bytes >= compute), what
            added = (with_adapter.weights_bytes - without.weights_bytes) / 2**20
            assert added == pytest.approx(truth["lora_mib"].get(place, 0.0), abs=0.0101), f"{place} of {what}"


def test_an_adapter_is_never_mapped(tmp_path: Path) -> None:
    spec, context = SMALL["llama"], ContextParams(n_ctx=512)
    shape = read_shape(write_model(spec, tmp_path / "model.gguf"))
    adapter = read_adapter(adapter_file(spec, 16).write(tmp_path / "style.gguf"))
    costs = [
        host_memory(each, Layout(), context, footprint(each, Layout(), context, CHECKED_BUILD), process_bytes=0)
        for each in (shape, adapted(shape, [adapter]))
    ]
    before, after = costs
    assert after.mapped_bytes == before.mapped_bytes
    assert after.buffers_bytes - before.buffers_bytes >= sum(t.n_bytes for pair in adapter.pairs.values() for t in pair)
    assert 0 < after.tables_bytes - before.tables_bytes < 1 << 20


def test_the_embedding_of_a_model_without_an_output_can_be_adapted(tmp_path: Path) -> None:
    spec = SMALL["bert"]
    shape = read_shape(write_model(spec, tmp_path / "model.gguf"))
    adapter = read_adapter(adapter_file(spec, 8, r"^token_embd\.weight").write(tmp_path / "style.gguf"))
    assert adapted(shape, [adapter]).weights_bytes > shape.weights_bytes


def test_unlike_ranks_and_graphs_that_are_not_drawn_are_bounded(tmp_path: Path) -> None:
    spec = SMALL["llama"]
    shape = read_shape(write_model(spec, tmp_path / "model.gguf"))
    small, large = (read_adapter(adapter_file(spec, rank).write(tmp_path / f"{rank}.lora")) for rank in (8, 64))
    card = Layout((DeviceSpec("gpu0", "cuda"),), -1, (1,))
    one, both = (
        footprint(adapted(shape, few), card, ContextParams(), CHECKED_BUILD).devices[0]
        for few in ([large], [small, large])
    )
    assert both.compute_bytes >= one.compute_bytes
    assert both.weights_bytes > one.weights_bytes
    assert adapted(shape, []) is shape
    assert adapted(shape, [small]).fingerprint not in (shape.fingerprint, adapted(shape, [large]).fingerprint)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arch": "qwen3"}, "adapts qwen3 models, this one is llama"),
        ({"n_layer": 9}, "which the model does not have"),
        ({"n_ff": 512}, "do not fit blk.0.ffn"),
    ],
)
def test_adapters_of_other_models_are_refused(change: dict[str, object], words: str, tmp_path: Path) -> None:
    shape = read_shape(write_model(SMALL["llama"], tmp_path / "model.gguf"))
    other = replace(SMALL["llama"], **change)  # type: ignore[arg-type]
    adapter = read_adapter(adapter_file(other, 8).write(tmp_path / "other.lora"))
    with pytest.raises(Rejected, match=words):
        adapted(shape, [adapter])


def test_an_embedding_that_is_the_output_too_cannot_be_adapted(tmp_path: Path) -> None:
    spec = SMALL["llama-tied"]
    shape = read_shape(write_model(spec, tmp_path / "model.gguf"))
    adapter = read_adapter(adapter_file(spec, 8, r"^token_embd\.weight").write(tmp_path / "a.lora"))
    with pytest.raises(Rejected, match="would end the process"):
        adapted(shape, [adapter])


def test_files_that_are_no_adapters(tmp_path: Path) -> None:
    with pytest.raises(InvalidGGUF, match="not a LoRA adapter"):
        read_adapter(write_model(SMALL["llama"], tmp_path / "model.gguf"))
    for change, words in (
        (lambda g: g.tensors.clear(), "changes nothing"),
        (lambda g: g.tensors.pop(), "one half"),
        (lambda g: g.tensors.append(("blk.0.attn_q.bias", (8,), "f32")), "neither half"),
        (lambda g: g.tensors.__setitem__(0, (g.tensors[0][0], (128, 4), "f16")), "ranks"),
    ):
        gguf = adapter_file(SMALL["llama"], 8)
        change(gguf)
        with pytest.raises(InvalidGGUF, match=words):
            read_adapter(gguf.write(tmp_path / "a.lora"))
