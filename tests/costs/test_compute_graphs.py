"""Drawing, splitting and packing graphs: what ggml does, and what is left out because it changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_shapes import GOLDEN, SMALL, write_model

from scheduler.costs.families import ROWS
from scheduler.costs.footprint import bounded_footprint, computes_exactly, footprint
from scheduler.costs.graph import buffers
from scheduler.costs.graph.allocate import Arena
from scheduler.costs.graph.buffers import shortened
from scheduler.costs.graph.templates import CHECKED_BUILD, TEMPLATES
from scheduler.costs.params import ContextParams, DeviceKind, DeviceSpec, Layout
from scheduler.costs.shape import ModelShape, read_shape

ShapeOf = Callable[[str], ModelShape]


@pytest.mark.parametrize(
    ("row", "cycle", "kept"),
    [
        ("", 6, ""),
        ("aaab", 6, "aaab"),
        ("aaaaaaaab", 6, "aaaaaaaab"),
        ("aaaaaaaaab", 6, "aaab"),
        ("aaaaaaaaaabbbbbbbbb", 6, "aaaabbb"),
        ("aaaaaaaaaabbbbbbbbb", 2, "aaaabbb"),
        ("a" * 32, 6, "a" * 8),
        ("a" * 32, 2, "a" * 4),
        ("xababababababababababy", 2, "xababababababababababy"),
        ("abcdefghijklmnop", 2, "abcdefghijklmnop"),
    ],
)
def test_rows_of_like_layers_are_shortened(row: str, cycle: int, kept: str) -> None:
    assert "".join(shortened(row, cycle)) == kept


def layouts(n_layers: int, chance: random.Random) -> list[Layout]:
    found = []
    for _ in range(6):
        n = chance.randint(1, 8)
        devices = tuple(DeviceSpec(f"gpu{i}", chance.choice(("cuda", "rpc"))) for i in range(n))
        split = tuple(float(chance.randint(1, 9)) for _ in devices)
        offloaded = chance.choice((-1, chance.randint(0, n_layers + 1)))
        n_cpu_moe = chance.choice((0, chance.randint(0, n_layers)))
        found.append(Layout(devices, offloaded, split, chance.random() < 0.3, n_cpu_moe))
    return found


@pytest.mark.parametrize("name", [name for name, spec in (GOLDEN | SMALL).items() if spec.arch in TEMPLATES])
def test_shortening_changes_nothing(name: str, shape_of: ShapeOf, monkeypatch: pytest.MonkeyPatch) -> None:
    check_shortening(shape_of(name), name, monkeypatch)


@pytest.mark.parametrize("n_layer", [11, 12, 13])
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi2", "fused", "command-r", "glm4", "seed_oss"])
def test_shortening_leaves_whole_cycles_out(
    name: str, n_layer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(SMALL[name], n_layer=n_layer, n_vocab=64_000)  # logits weigh most: it matters where they find room
    check_shortening(read_shape(write_model(spec, tmp_path / "model.gguf", vocabulary=False)), name, monkeypatch)


def check_shortening(shape: ModelShape, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(name)
    for layout in layouts(shape.n_layer_all, chance):
        context = ContextParams(
            n_ctx=chance.choice((512, 4096, 32768)),
            n_seq_max=chance.choice((1, 1, 3)),
            n_ubatch=chance.choice((64, 512)),
            flash_attn=chance.choice(("on", "off")),
            kv_unified=chance.random() < 0.5,
        )
        short = footprint(shape, layout, context, CHECKED_BUILD)
        with monkeypatch.context() as patch:
            patch.setattr(buffers, "shortened", lambda row, _: list(row))
            assert footprint(shape, layout, context, CHECKED_BUILD) == short, (layout, context)


@pytest.mark.parametrize("kind", ["cuda", "rpc"])
@pytest.mark.parametrize("name", [name for name, spec in (GOLDEN | SMALL).items() if not ROWS[spec.arch].leaks])
def test_the_bound_is_not_below_the_graph(name: str, kind: DeviceKind, shape_of: ShapeOf) -> None:
    """Also where CUDA multiplies by weights in host RAM."""
    shape, chance = shape_of(name), random.Random(f"{name} {kind}")
    for layout in layouts(shape.n_layer_all, chance):
        alike = replace(layout, devices=tuple(replace(device, kind=kind) for device in layout.devices))
        context = ContextParams(
            n_ctx=chance.choice((512, 4096, 16384)), n_seq_max=chance.choice((1, 2)), n_ubatch=chance.choice((64, 512))
        )
        graph, bound = footprint(shape, alike, context, CHECKED_BUILD), bounded_footprint(shape, alike, context)
        for exact, ours in zip((*graph.devices, graph.host), (*bound.devices, bound.host), strict=True):
            assert ours.compute_bytes >= exact.compute_bytes, (alike, context)


def test_a_tied_embedding_is_copied_to_the_device_of_the_output(shape_of: ShapeOf) -> None:
    """Were it read on the host, the device would hold the matrix once more in its compute buffer."""
    tied, untied = shape_of("llama-tied"), shape_of("llama")
    layout = Layout((DeviceSpec("gpu0", "rpc"),), -1, (1,))
    context = ContextParams(n_ctx=1024)
    assert footprint(tied, layout, context, CHECKED_BUILD).devices[0].compute_bytes == (
        footprint(untied, layout, context, CHECKED_BUILD).devices[0].compute_bytes
    )


def test_the_allocator_takes_the_best_fitting_hole_and_merges_what_is_freed() -> None:
    arena = Arena()
    first, second, third, fourth = (arena.take(size) for size in (64, 128, 32, 256))
    arena.give(second, 128)
    arena.give(first, 64)
    assert arena.take(160) == first  # the two holes have become one
    assert arena.take(512) == fourth + 256
    arena.give(third, 32)
    assert arena.take(32) in (first + 160, third)
    assert arena.max_bytes == fourth + 256 + 512


def test_an_empty_hole_may_leave_the_list_out_of_order() -> None:
    """ggml puts a hole before the first that lies behind it, wherever that has come to by then."""
    arena = Arena()
    first, nothing = arena.take(32), arena.take(0)
    arena.give(first, 32)
    arena.give(nothing, 0)
    taken = [arena.take(size) for size in (64, 32, 64)]
    assert taken == [0, 64, 96]
    arena.give(64, 32)
    arena.give(96, 64)
    assert arena.take(64) == 64


def without(shape: ModelShape, stem: str) -> ModelShape:
    """The shape of a file that lacks one weight in one layer."""
    first, *others = shape.graph.layers
    lacking = {name: width for name, width in first.items() if not name.startswith(stem)}
    return replace(shape, graph=replace(shape.graph, layers=(lacking, *others)))


@pytest.mark.parametrize("stem", ["attn_q.", "attn_output.", "ffn_up.", "ffn_down."])
def test_a_graph_that_cannot_be_drawn_is_bounded(stem: str, shape_of: ShapeOf) -> None:
    shape = shape_of("llama")
    broken = without(shape, stem)
    assert computes_exactly(shape, CHECKED_BUILD) and not computes_exactly(broken, CHECKED_BUILD)
    layout, context = Layout(), ContextParams()
    exact, bound = (footprint(model, layout, context, CHECKED_BUILD).host.compute_bytes for model in (shape, broken))
    assert bound >= exact


def test_weights_of_the_wrong_size_are_not_drawn(shape_of: ShapeOf) -> None:
    shape = shape_of("llama")
    first, *others = shape.graph.layers
    wide = first | {"attn_k.weight": replace(first["attn_k.weight"], ne=(32, 4096))}
    assert not computes_exactly(replace(shape, graph=replace(shape.graph, layers=(wide, *others))), CHECKED_BUILD)


def test_no_model_uses_more_experts_than_llama_cpp_knows(shape_of: ShapeOf) -> None:
    shape = shape_of("mixtral")
    greedy = replace(shape.graph, arch=replace(shape.arch, n_expert=1 << 30, n_expert_used=1 << 30))
    assert not computes_exactly(replace(shape, graph=greedy), CHECKED_BUILD)


@pytest.mark.parametrize("build", ["0.9.0", "0.3.3", "0.3.366+cpu", "+cpu", ""])
def test_another_llama_cpp_gets_the_bound(build: str, shape_of: ShapeOf) -> None:
    shape, layout, context = shape_of("llama"), Layout(), ContextParams(n_ctx=1024)
    exact = footprint(shape, layout, context, CHECKED_BUILD)
    assert computes_exactly(shape, f"{CHECKED_BUILD}+cuda") and not computes_exactly(shape, build)
    assert footprint(shape, layout, context, f"{CHECKED_BUILD}+cuda") == exact
    bounded = footprint(shape, layout, context, build)
    assert bounded == bounded_footprint(shape, layout, context)
    assert bounded.host.compute_bytes > exact.host.compute_bytes
