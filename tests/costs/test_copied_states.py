"""Copies of recurrent states (`n_rs_seq`): what they take, and that llama.cpp goes back to the right one."""

from __future__ import annotations

import random
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparison import ONE_OF_THREE, Case, ask, every_architecture, may_be_run, on_devices, paths_of
from test_against_llama_cpp import compare
from test_compute_graphs import layouts

from actors.serving.model import Row
from actors.serving.native import NativeModel
from actors.serving.protocol import LoadSpec
from scheduler.costs.cache import window_and_state_bytes
from scheduler.costs.families import ROWS
from scheduler.costs.footprint import bounded_footprint, computes_exactly, effective_context, footprint
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.params import ContextParams, DeviceKind, Layout
from scheduler.costs.shape import ModelShape, read_shape
from scheduler.errors import Rejected

pytestmark = pytest.mark.llama

COPYING = [row.name for row in ROWS.values() if row.copies_states]
OTHERS = ["qwen3next", "mamba2", "falcon-h1", "rwkv7", "llama"]
"""Some of those of which llama.cpp keeps none, whatever it is asked for."""
CONTEXTS = [
    ContextParams(n_ctx=1024, n_outputs_max=4, n_rs_seq=3),
    ContextParams(n_ctx=3000, n_seq_max=3, flash_attn="off", n_outputs_max=6, n_rs_seq=3),
    ContextParams(n_ctx=2048, n_seq_max=4, n_ubatch=64, kv_unified=True, n_outputs_max=19, n_rs_seq=15),
    ContextParams(n_ctx=1024, n_ubatch=17, n_outputs_max=16, n_rs_seq=15),
]


KINDS: tuple[DeviceKind, ...] = ("cuda", "rpc")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return paths_of(every_architecture(tmp_path_factory.mktemp("copying"), *COPYING, *OTHERS))


@pytest.fixture(scope="module")
def shapes(paths: dict[str, Path]) -> dict[str, ModelShape]:
    return {name: read_shape(path) for name, path in paths.items()}


@pytest.mark.parametrize(
    ("given", "contexts", "devices"),
    [([Layout()], CONTEXTS, 0), ([on_devices(1, 1), ONE_OF_THREE], CONTEXTS[::2], 2)],
    ids=["on the CPU", "on two devices"],
)
def test_copies_take_what_is_predicted(
    given: list[Layout],
    contexts: list[ContextParams],
    devices: int,
    paths: dict[str, Path],
    shapes: dict[str, ModelShape],
) -> None:
    assert {shape.architecture for shape in shapes.values()} == {*COPYING, *OTHERS}
    cases: list[Case] = [
        (name, layout, context)
        for name, shape in shapes.items()
        for layout in given
        for context in contexts
        if may_be_run(shape, layout, context)
    ]
    for case, truth in zip(cases, ask(paths, cases, devices=devices, real=True), strict=True):
        shape = shapes[case[0]]
        compare(case, shape, truth, "equal" if computes_exactly(shape, CHECKED_BUILD) else "not below")


@pytest.mark.parametrize("name", [name for name in COPYING if not ROWS[name].leaks and name != "glm5-next"])
def test_the_bound_is_not_below_the_graph_with_copies(name: str, shapes: dict[str, ModelShape]) -> None:
    chance = random.Random(name)
    for shape in (each for each in shapes.values() if each.architecture == name):
        for drawn in (*layouts(shape.n_layer_all, chance), *layouts(shape.n_layer_all, chance)):
            kind = chance.choice(KINDS)
            layout = replace(drawn, devices=tuple(replace(device, kind=kind) for device in drawn.devices))
            context = ContextParams(
                n_ctx=chance.choice((512, 4096)),
                n_seq_max=chance.choice((1, 2, 4)),
                n_ubatch=chance.choice((20, 64, 512)),
                n_rs_seq=chance.choice((1, 3, 15)),
            )
            graph, bound = footprint(shape, layout, context, CHECKED_BUILD), bounded_footprint(shape, layout, context)
            for exact, ours in zip((*graph.devices, graph.host), (*bound.devices, bound.host), strict=True):
                assert ours.compute_bytes >= exact.compute_bytes, (layout, context)


def test_each_copy_takes_as_much_as_the_state(shapes: dict[str, ModelShape]) -> None:
    shape, alone = shapes["qwen35-dense"], ContextParams(n_ctx=1024, n_seq_max=2)
    caches = [
        footprint(shape, Layout(), replace(alone, n_rs_seq=n), CHECKED_BUILD).host.kv_bytes for n in (0, 1, 2, 15)
    ]
    n_recurrent = sum(layer.is_recurrent for layer in shape.arch.layers)
    per_copy = 2 * n_recurrent * 4 * (shape.arch.state_r + shape.arch.state_s)
    assert [each - caches[0] for each in caches] == [0, per_copy, 2 * per_copy, 15 * per_copy]
    assert window_and_state_bytes(shape.arch, alone) == window_and_state_bytes(shape.arch, replace(alone, n_rs_seq=3))


def test_what_llama_cpp_would_end_the_process_over_is_refused(shapes: dict[str, ModelShape]) -> None:
    for n_ubatch, words in (
        (4, "n_ubatch is 4: 3 copies of recurrent states need at least 5; raise n_ubatch"),
        (5, ""),
    ):
        context = ContextParams(n_ubatch=n_ubatch, n_rs_seq=3)
        if words:
            with pytest.raises(Rejected, match=words):
                effective_context(shapes["qwen35-dense"], context)
        else:
            assert effective_context(shapes["qwen35-dense"], context).n_rs_seq == 3
        assert effective_context(shapes["mamba2-dense"], context).n_rs_seq == 0


PROMPT = [7, 11, 300, 2, 45, 45, 78, 5, 90, 100, 101, 33, 20, 21, 22]


@pytest.mark.parametrize("name", [name for name in COPYING if name not in ("qwen35moe", "qwen4exp")])  # they take long
def test_llama_cpp_goes_back_to_the_right_copy(name: str, paths: dict[str, Path]) -> None:
    """Tokens that are taken back leave nothing behind: what follows has the logits that it has without them."""
    path = next(path for stem, path in paths.items() if stem.rpartition("-")[0] == name)
    context = ContextParams(
        n_ctx=1024, n_seq_max=3, n_batch=512, n_ubatch=128, type_k="f32", type_v="f32", flash_attn="off",
        kv_unified=True, swa_full=True, n_outputs_max=64, n_rs_seq=4,
    )  # fmt: skip
    load = LoadSpec(name, str(path), (), 0, (), "", context, 2, 0)
    with closing(NativeModel(load, (), lambda progress: None)) as model:
        model.warm_up()

        def read(tokens: list[int], start: int, *sequences: int) -> Any:
            """The logits after all of them, for the last of `sequences`."""
            rows = [Row(token, start + at, each, True) for each in sequences for at, token in enumerate(tokens)]
            assert model.decode(rows) == 0
            return model.logits(len(rows) - 1)

        def expected(tokens: list[int]) -> Any:
            model.clear(2)
            logits = read(tokens, 0, 2)
            model.clear(2)
            return logits

        for n_wrong in (1, 2, 4):
            for sequences in ((0,), (0, 1)):
                for each in sequences:
                    model.clear(each)
                read(PROMPT, 0, *sequences)
                read([50, 51, 52, 53, 54], len(PROMPT), *sequences)
                kept = len(PROMPT) + 5 - n_wrong
                assert all(model.cut(each, kept, kept + n_wrong) for each in sequences)
                right = [*PROMPT, *[50, 51, 52, 53, 54][: 5 - n_wrong]]
                same = read([60, 61], kept, *sequences)
                np.testing.assert_allclose(same, expected([*right, 60, 61]), rtol=0, atol=2e-4)
