"""Every architecture that the installed llama.cpp knows: a small model of each, made by llama.cpp, loaded for real.

Weights, caches, states and outputs have to be equal to the byte, compute buffers never below, and equal where a
template draws the graph. docs/architectures.md says the same in words, and is held to it here.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from comparison import (
    CONTEXTS,
    EVERY_CASES,
    LOOSE,
    MANY_SEQUENCES,
    ONE_OF_THREE,
    STREAMS,
    TARGETS,
    WIDE,
    WIDE_CASES,
    WIDE_CONTEXTS,
    Case,
    ask,
    every_architecture,
    may_be_run,
    on_devices,
    paths_of,
)
from gguf_file import U32, Gguf
from test_against_llama_cpp import compare

from scheduler.costs.checked import CHECKED
from scheduler.costs.footprint import bounded_footprint, computes_exactly, filled_footprint, footprint
from scheduler.costs.graph.buffers import has_template
from scheduler.costs.graph.templates import CHECKED_BUILD, TEMPLATES
from scheduler.costs.header import read_header
from scheduler.costs.params import ContextParams, Layout
from scheduler.costs.shape import ModelShape, read_shape
from scheduler.errors import InvalidGGUF, Rejected

pytestmark = pytest.mark.llama


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What became of each architecture: its model's path, or why there is none."""
    return every_architecture(tmp_path_factory.mktemp("architectures"))


@pytest.fixture(scope="module")
def paths(made: list[dict[str, Any]]) -> dict[str, Path]:
    return paths_of(made)


@pytest.fixture(scope="module")
def shapes(paths: dict[str, Path]) -> dict[str, ModelShape]:
    return {name: read_shape(path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def wide_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return paths_of(every_architecture(tmp_path_factory.mktemp("wide"), *WIDE, wide=True))


def cases_of(shapes: dict[str, ModelShape], layouts: list[Layout], contexts: list[ContextParams]) -> list[Case]:
    """Each model with each layout and context in which llama.cpp runs it."""
    return [
        (name, layout, context)
        for name, shape in shapes.items()
        for layout in layouts
        for context in contexts
        if may_be_run(shape, layout, context)
    ]


def test_every_architecture_that_passed_is_made(made: list[dict[str, Any]]) -> None:
    """So that the tests below compare it; the others cannot be run, or are asked about first."""
    names = {each["arch"] for each in made if "path" in each}
    passed = {name for name, verdict in CHECKED[CHECKED_BUILD].items() if verdict != "refused"}
    assert names >= passed
    assert len(names) > 150


def test_every_template_draws_a_model(shapes: dict[str, ModelShape]) -> None:
    """Whose buffers the tests below then compare."""
    assert {shape.architecture for shape in shapes.values() if has_template(shape.graph)} == set(TEMPLATES)


@pytest.mark.parametrize(
    ("layouts", "contexts", "devices"),
    EVERY_CASES,
    ids=["on the CPU", "on two devices"],
)
def test_every_architecture_takes_what_is_predicted(
    layouts: list[Layout],
    contexts: list[ContextParams],
    devices: int,
    paths: dict[str, Path],
    shapes: dict[str, ModelShape],
) -> None:
    cases = cases_of(shapes, layouts, contexts)
    assert {name for name, _, _ in cases} >= {name for name, shape in shapes.items() if shape.architecture != "plm"}
    answers = ask(paths, cases, devices=devices, real=True, targets=TARGETS)
    for case, truth in zip(cases, answers, strict=True):
        shape = shapes[case[0]]
        bounded = "any" if shape.architecture in LOOSE else "not below"
        compare(case, shape, truth, "equal" if computes_exactly(shape, CHECKED_BUILD) else bounded)


def test_deepseek4_that_lacks_the_tensors_of_its_prediction_layer_has_none(
    paths: dict[str, Path], tmp_path: Path
) -> None:
    """llama.cpp then runs the last layer as it does the others; so do converters that leave prediction layers out."""
    path = with_key(paths["deepseek4-moe"], "deepseek4.nextn_predict_layers", 1, tmp_path / "deepseek4-nextn.gguf")
    shape = read_shape(path)
    layout = Layout(on_devices(1).devices, 2, (1,))
    cases: list[Case] = [(path.stem, layout, context) for context in CONTEXTS[:3]]
    for case, truth in zip(cases, ask({path.stem: path}, cases, devices=1, real=True), strict=True):
        compare(case, shape, truth, "equal" if computes_exactly(shape, CHECKED_BUILD) else "not below")


def test_many_sequences_over_host_and_device(paths: dict[str, Path], shapes: dict[str, ModelShape]) -> None:
    cases: list[Case] = [(name, Layout(on_devices(1).devices, 2, (1,)), MANY_SEQUENCES) for name in STREAMS]
    for case, truth in zip(cases, ask(paths, cases, devices=1, real=True), strict=True):
        shape = shapes[case[0]]
        compare(case, shape, truth, "equal" if computes_exactly(shape, CHECKED_BUILD) else "not below")


@pytest.mark.parametrize("layout", [Layout(), on_devices(1, 1), ONE_OF_THREE], ids=["CPU", "two", "split"])
def test_buffers_that_grow_are_booked_whole_where_they_are_bounded_too(
    layout: Layout, shapes: dict[str, ModelShape]
) -> None:
    """The bound alone holds for an empty cache."""
    shape, context = shapes["minimax-m3-moe"], ContextParams(n_ctx=4096)
    filled, bounded = (filled_footprint(shape, layout, context, build) for build in (CHECKED_BUILD, "9.8.7"))
    empty = bounded_footprint(shape, layout, context)
    for whole, bound, now in zip(
        (*filled.devices, filled.host), (*bounded.devices, bounded.host), (*empty.devices, empty.host), strict=True
    ):
        assert bound.compute_bytes == max(whole.compute_bytes, now.compute_bytes)
        assert (bound.weights_bytes, bound.kv_bytes) == (now.weights_bytes, now.kv_bytes)
    assert filled.host.compute_bytes > footprint(shape, layout, context, CHECKED_BUILD).host.compute_bytes


def with_key(model: Path, key: str, value: int, path: Path) -> Path:
    """A copy of `model` with one more key in its metadata."""
    header = read_header(model)
    pair = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<II", U32, value)
    with model.open("rb") as source, path.open("wb") as copy:
        start, rest = source.read(24), source.read(header.header_bytes - 24)
        copy.write(start[:16] + struct.pack("<Q", len(header.metadata) + 1) + pair + rest)
        end = -(-copy.tell() // header.alignment) * header.alignment
        copy.truncate(end + header.file_bytes - header.data_offset)
    return path


@pytest.mark.parametrize(("layout", "devices"), WIDE_CASES, ids=["on the CPU", "on a device"])
def test_wide_models_take_what_is_predicted(layout: Layout, devices: int, wide_paths: dict[str, Path]) -> None:
    """In models with real widths other moments are the largest than in small ones."""
    shapes = {name: read_shape(path) for name, path in wide_paths.items()}
    cases = cases_of(shapes, [layout], WIDE_CONTEXTS)
    for case, truth in zip(cases, ask(wide_paths, cases, devices=devices, real=False), strict=True):
        shape = shapes[case[0]]
        compare(case, shape, truth, "equal" if computes_exactly(shape, CHECKED_BUILD) else "not below")


def test_what_cannot_be_run_is_refused_with_the_reason(tmp_path: Path, paths: dict[str, Path]) -> None:
    projector = Gguf()
    projector.set("general.architecture", "clip")
    projector.tensors = [("v.patch_embd.weight", (14, 14, 3, 64), "f16")]
    with pytest.raises(InvalidGGUF, match="give it as mmproj"):
        read_shape(projector.write(tmp_path / "mmproj.gguf"))
    with pytest.raises(Rejected, match="ends the process"):
        footprint(read_shape(paths["plm-dense"]), Layout(), ContextParams(), CHECKED_BUILD)
