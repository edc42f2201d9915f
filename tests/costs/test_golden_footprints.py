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

from scheduler.costs.footprint import effective_context, footprint
from scheduler.costs.graph.buffers import PIPELINE_COPIES
from scheduler.costs.graph.templates import TEMPLATES
from scheduler.costs.params import ContextParams, DeviceSpec, Layout
from scheduler.costs.shape import ModelShape

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
        result = footprint(shape, layout, context)
        got = [[device.weights_bytes, device.kv_bytes] for device in result.devices]
        assert got == [device[:2] for device in record["devices"]], (layout, context)
        assert [result.host.weights_bytes, result.host.kv_bytes] == record["host"][:2], (layout, context)
        assert result.host.output_bytes / 2**20 == pytest.approx(record["output_mib"], abs=0.0051)


@pytest.mark.parametrize("model", [name for name, spec in GOLDEN.items() if spec.arch in TEMPLATES])
def test_compute_is_equal_to_the_byte(model: str, shape_of: ShapeOf) -> None:
    """`no_alloc` loses the places of norms: with several devices, those after the first hold an activation more."""
    shape = shape_of(model)
    for record in (r for r in RECORDS if r["model"] == model and r["context"][4:6] == ["f16", "f16"]):
        layout, context = asked(record)
        context = replace(context, op_offload=False)  # the recorded devices did not take it
        size = effective_context(shape, context)
        whole = record["n_gpu_layers"] == -1 and not record["experts_on_host"]
        activation = 4 * shape.n_embd * -(-size.n_tokens // size.n_seq_max) * size.n_seq_max
        result = footprint(shape, layout, context)
        for i, (device, (_, _, compute)) in enumerate(zip(result.devices, record["devices"], strict=True)):
            lost = PIPELINE_COPIES * activation if whole and i else 0
            assert device.compute_bytes + lost == compute, (i, layout, context)
        assert result.host.compute_bytes == record["host"][2], (layout, context)


@pytest.mark.parametrize("model", [name for name, spec in GOLDEN.items() if spec.arch not in TEMPLATES])
def test_compute_is_never_below(model: str, shape_of: ShapeOf) -> None:
    shape = shape_of(model)
    for record in (r for r in RECORDS if r["model"] == model and r["context"][4:6] == ["f16", "f16"]):
        layout, context = asked(record)
        result = footprint(shape, layout, context)
        for device, (_, _, compute) in zip(result.devices, record["devices"], strict=True):
            assert device.compute_bytes >= compute, (layout, context)
        assert result.host.compute_bytes >= record["host"][2], (layout, context)


def test_compute_is_tight_where_everything_is_offloaded(shape_of: ShapeOf) -> None:
    excess = []
    for record in RECORDS:
        layout, context = asked(record)
        if record["n_gpu_layers"] != -1 or record["experts_on_host"] or context.type_k != "f16":
            continue
        result = footprint(shape_of(record["model"]), layout, context)
        for device, (_, _, compute) in zip(result.devices, record["devices"], strict=True):
            excess.append(device.compute_bytes / compute - 1)
    excess.sort()
    assert excess[len(excess) // 2] < 0.08
    assert excess[int(len(excess) * 0.9)] < 0.30


def test_host_compute_is_nearly_exact_where_everything_is_offloaded(shape_of: ShapeOf) -> None:
    for record in RECORDS:
        layout, context = asked(record)
        if record["n_gpu_layers"] != -1 or record["experts_on_host"] or context.type_k != "f16":
            continue
        result = footprint(shape_of(record["model"]), layout, context)
        assert result.host.compute_bytes - record["host"][2] < 96 * 1024
