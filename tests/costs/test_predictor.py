"""Prediction layers: what they take once they are loaded, and what a context for them takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from comparison import Case, ask, on_devices
from gguf_shapes import SMALL, write_model

from scheduler.costs.footprint import footprint, mtp_footprint, with_mtp
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.params import ContextParams, Layout
from scheduler.costs.shape import read_shape
from scheduler.errors import Rejected

MODELS = {
    "glm4moe": replace(SMALL["glm4moe-nextn"], nextn=1),
    "qwen3next": SMALL["qwen3next-nextn"],
    "qwen35": replace(SMALL["qwen35"], n_layer=9, nextn=1),
    "qwen35moe": replace(SMALL["qwen35moe"], n_layer=9, nextn=1),
}
CONTEXTS = [
    ContextParams(n_ctx=1024),
    ContextParams(n_ctx=2048, n_ubatch=64, n_seq_max=2, flash_attn="off"),
    ContextParams(n_ctx=4096, n_seq_max=4, kv_unified=True),
]


@pytest.mark.llama
@pytest.mark.parametrize("devices", [0, 2])
def test_predictors_take_what_is_predicted(devices: int, tmp_path: Path) -> None:
    paths = {name: write_model(spec, tmp_path / f"{name}.gguf") for name, spec in MODELS.items()}
    layouts = [on_devices(1, 1), Layout(on_devices(1, 1).devices, 3, (2, 1))] if devices else [Layout()]
    cases: list[Case] = [(name, layout, context) for name in MODELS for layout in layouts for context in CONTEXTS]
    truths = ask(paths, cases, devices=devices, real=True, mtp=True)
    for (name, layout, context), truth in zip(cases, truths, strict=True):
        what, shape = f"{name}, {layout}, {context}", read_shape(paths[name])
        assert "error" not in truth, f"{what}: {truth}"
        model, second = (
            footprint(with_mtp(shape), layout, context, CHECKED_BUILD),
            mtp_footprint(shape, layout, context),
        )
        got = {f"RPC{i}": pair for i, pair in enumerate(zip(model.devices, second.devices, strict=True))}
        for place, (first, ours) in (got | {"host": (model.host, second.host)}).items():
            weights, cache, compute = truth["bytes"].get(place, [0, 0, 0])
            assert (first.weights_bytes, ours.kv_bytes) == (weights, cache), f"{place} of {what}"
            assert ours.compute_bytes >= compute, f"{place} of {what}"
        assert second.host.output_bytes / 2**20 == pytest.approx(truth["output_mib"], abs=0.0051), what


def test_weights_are_counted_only_when_loaded(tmp_path: Path) -> None:
    shape = read_shape(write_model(MODELS["glm4moe"], tmp_path / "model.gguf"))
    apart, loaded = (
        footprint(each, Layout(), ContextParams(), CHECKED_BUILD).host for each in (shape, with_mtp(shape))
    )
    assert loaded.weights_bytes > apart.weights_bytes
    assert with_mtp(shape).fingerprint != shape.fingerprint  # what was measured of one says nothing about the other
    assert (loaded.kv_bytes, loaded.compute_bytes) == (apart.kv_bytes, apart.compute_bytes)


@pytest.mark.parametrize("name", ["llama", "qwen3next"])
def test_models_without_prediction_layers(name: str, tmp_path: Path) -> None:
    shape = read_shape(write_model(SMALL[name], tmp_path / "model.gguf"))
    for ask_for in (with_mtp, lambda shape: mtp_footprint(shape, Layout(), ContextParams())):
        with pytest.raises(Rejected, match="no prediction layers"):
            ask_for(shape)
