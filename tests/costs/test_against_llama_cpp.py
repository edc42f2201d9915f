"""The installed llama.cpp is the truth: what it allocates for small models of many architectures, loaded for real."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from comparison import (
    OUTPUT_ROUNDING_MIB,
    REAL_CASES,
    SMALL_CONTEXTS,
    Case,
    ask,
    on_devices,
    places,
)
from gguf_shapes import SMALL

from scheduler.costs.footprint import computes_exactly, effective_context, footprint
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.params import DeviceSpec, Layout
from scheduler.costs.shape import ModelShape, read_shape

pytestmark = pytest.mark.llama


def cases_on_one_device(name: str) -> list[Case]:
    layouts = [on_devices(1), Layout((DeviceSpec("gpu0", "rpc"),), 2, (1,))]
    return [(name, layout, context) for layout in layouts for context in SMALL_CONTEXTS[:4]]


def compare(case: Case, shape: ModelShape, truth: dict[str, Any], graph: Literal["equal", "not below", "any"]) -> None:
    """Asserts that the footprint of a case is what llama.cpp said of it; `graph`: how its compute buffers compare."""
    _, layout, context = case
    what = f"{case[0]}, {layout}, {context}"
    assert "error" not in truth, f"{what}: {truth}"
    result = footprint(shape, layout, context, CHECKED_BUILD)
    assert truth["n_ctx"] == effective_context(shape, context).n_ctx, what
    assert result.host.output_bytes / 2**20 == pytest.approx(truth["output_mib"], abs=OUTPUT_ROUNDING_MIB), what
    for place, ours in places(result).items():
        weights, cache, compute = truth["bytes"].get(place, [0, 0, 0])
        assert (ours.weights_bytes, ours.kv_bytes) == (weights, cache), f"{place} of {what}"
        if graph == "equal":
            assert ours.compute_bytes == compute, f"the graph of {case[0]} has changed: {place} of {what}"
        elif graph == "not below":
            assert ours.compute_bytes >= compute, f"{place} of {what}"


@pytest.mark.parametrize(
    ("make", "devices", "real"),
    [*((make, devices, True) for make, devices in REAL_CASES), (cases_on_one_device, 1, False)],
    ids=["real loads on the CPU", "real loads on two devices", "on eight devices", "one device without allocating"],
)
def test_footprints_are_what_llama_cpp_allocates(
    make: Callable[[str], list[Case]], devices: int, real: bool, small_models: dict[str, Path]
) -> None:
    cases = [case for name in SMALL for case in make(name)]
    shapes = {name: read_shape(path) for name, path in small_models.items()}
    for case, truth in zip(cases, ask(small_models, cases, devices=devices, real=real), strict=True):
        shape = shapes[case[0]]
        compare(case, shape, truth, "equal" if real and computes_exactly(shape, CHECKED_BUILD) else "not below")
