"""640 answers of llama.cpp itself: ten models, seven placements, ten contexts, on devices that size as CUDA does.

golden.json was recorded once from llama-cpp-python 0.3.36 with `no_alloc`. Its compute figures are never below a real
load: `no_alloc` counts one activation per pipeline copy too many on later devices. With a quantised cache they lack
CUDA's F16 copies, so there only weights and cache are compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf_shapes import GOLDEN

from scheduler.costs.compute import place_compute
from scheduler.costs.footprint import bounded_footprint, footprint
from scheduler.costs.graph import buffers
from scheduler.costs.graph.blocks import Build
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.params import ContextParams, DeviceSpec, Layout
from scheduler.costs.shape import ModelShape
from scheduler.costs.weights import assign_layers

ShapeOf = Callable[[str], ModelShape]
RECORDS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))


def asked(record: dict[str, Any]) -> tuple[Layout, ContextParams]:
    layout = Layout(
        devices=tuple(DeviceSpec(f"gpu{i}", "cuda") for i in range(len(record["devices"]))),
        n_gpu_layers=record["n_gpu_layers"],
        tensor_split=tuple(record["tensor_split"]),
        experts_on_host=record["experts_on_host"],
    )
    return layout, ContextParams(*record["context"])


def test_all_records_are_there() -> None:
    assert len(RECORDS) == 640
    assert {record["model"] for record in RECORDS} == set(GOLDEN)


@pytest.mark.parametrize("model", GOLDEN)
def test_weights_cache_and_output_are_equal_to_the_byte(model: str, shape_of: ShapeOf) -> None:
    shape = shape_of(model)
    for record in (r for r in RECORDS if r["model"] == model):
        layout, context = asked(record)
        result = bounded_footprint(shape, layout, context)  # no graph is drawn for what no graph decides
        got = [[device.weights_bytes, device.kv_bytes] for device in result.devices]
        assert got == [device[:2] for device in record["devices"]], (layout, context)
        assert [result.host.weights_bytes, result.host.kv_bytes] == record["host"][:2], (layout, context)
        assert result.host.output_bytes / 2**20 == pytest.approx(record["output_mib"], abs=0.0051)


@pytest.mark.parametrize("model", GOLDEN)
@pytest.mark.slow
def test_compute_is_equal_to_the_byte(model: str, shape_of: ShapeOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `no_alloc` sees it: it forgets that norms are kept on their layer's device, which a real load heeds."""
    shape = shape_of(model)
    monkeypatch.setattr(buffers, "Build", lambda *given: Build(*given[:-1], False))
    buffers._reserved.cache_clear()
    for record in (r for r in RECORDS if r["model"] == model and r["context"][4:6] == ["f16", "f16"]):
        layout, context = asked(record)
        result = footprint(
            shape, layout, replace(context, op_offload=False), CHECKED_BUILD
        )  # the recorded devices did not take it
        got = [device.compute_bytes for device in result.devices]
        assert got == [compute for _, _, compute in record["devices"]], (layout, context)
        assert result.host.compute_bytes == record["host"][2], (layout, context)
    buffers._reserved.cache_clear()


def test_the_bound_is_never_below_and_tight_where_everything_is_offloaded(shape_of: ShapeOf) -> None:
    """What architectures without a template are costed with."""
    excess = []
    for record in (r for r in RECORDS if r["context"][4:6] == ["f16", "f16"]):
        shape = shape_of(record["model"])
        layout, context = asked(record)
        places = assign_layers(layout, shape.n_layer_all)
        devices, host = place_compute(shape.arch, shape.demand, shape.weights, layout, places, context)
        whole = record["n_gpu_layers"] == -1 and not record["experts_on_host"]
        for got, (_, _, compute) in zip(devices, record["devices"], strict=True):
            assert got >= compute, (layout, context)
            if whole:
                excess.append(got / compute - 1)
        assert host >= record["host"][2], (layout, context)
        assert not whole or host - record["host"][2] < 96 * 1024, (layout, context)
    excess.sort()
    assert excess[len(excess) // 2] < 0.08
    assert excess[int(len(excess) * 0.9)] < 0.30
