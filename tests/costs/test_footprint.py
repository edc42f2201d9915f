"""Rules of a footprint: rounding, splitting, what is refused, and what must hold for any layout."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_file import Gguf
from gguf_shapes import GOLDEN, SMALL, model_file, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.costs.footprint import computes_exactly, effective_context, footprint
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.header import split_name
from scheduler.costs.params import ContextParams, DeviceSpec, Layout
from scheduler.costs.shape import ModelShape, read_shape
from scheduler.costs.weights import HOST, assign_layers
from scheduler.errors import InvalidGGUF, Rejected
from scheduler.units import GIB, MIB

ShapeOf = Callable[[str], ModelShape]


def on(*split: float, kind: str = "rpc", **more: object) -> Layout:
    devices = tuple(DeviceSpec(f"gpu{i}", kind) for i in range(len(split)))  # type: ignore[arg-type]
    return Layout(devices, n_gpu_layers=-1, tensor_split=split, **more)  # type: ignore[arg-type]


def test_context_is_rounded_as_llama_cpp_rounds(shape_of: ShapeOf) -> None:
    shape = shape_of("llama")
    size = effective_context(shape, ContextParams(n_ctx=10000, n_seq_max=3))
    assert (size.n_ctx_seq, size.n_ctx, size.n_stream) == (3584, 10752, 3)
    shared = effective_context(shape, ContextParams(n_ctx=10000, n_seq_max=3, kv_unified=True))
    assert (shared.n_ctx_seq, shared.n_ctx, shared.n_stream) == (10240, 10240, 1)
    own = effective_context(shape, ContextParams(n_ctx=0))
    assert own.n_ctx == SMALL["llama"].n_ctx
    tiny = effective_context(shape, ContextParams(n_ctx=100))
    assert (tiny.n_ctx, tiny.n_batch, tiny.n_ubatch) == (256, 100, 100)


def test_window_layers_cache_only_their_window(shape_of: ShapeOf) -> None:
    shape = shape_of("gemma3")
    assert effective_context(shape, ContextParams(n_ctx=4096, n_ubatch=512)).n_swa_cells == 768
    assert effective_context(shape, ContextParams(n_ctx=4096, swa_full=True)).n_swa_cells == 4096
    kv = footprint(shape, on(1), ContextParams(n_ctx=4096), CHECKED_BUILD).devices[0].kv_bytes
    width = 2 * SMALL["gemma3"].n_head_kv * SMALL["gemma3"].head * 2
    assert kv == width * (7 * 768 + 1 * 4096)


@pytest.mark.parametrize(
    ("model", "context", "words"),
    [
        ("llama", ContextParams(type_v="q8_0", flash_attn="off"), "needs flash attention"),
        ("llama", ContextParams(type_k="q3_K"), "llama.cpp takes"),
        ("llama", ContextParams(flash_attn="auto"), "on or off"),  # type: ignore[arg-type]
        ("llama", ContextParams(n_seq_max=0), "n_seq_max"),
        ("llama", ContextParams(n_seq_max=257), "at most 256"),
        ("llama", ContextParams(n_ctx=256, n_seq_max=256, n_ubatch=0), "n_ubatch"),
        ("llama", ContextParams(n_ctx=-1), "n_ctx"),
        ("llama", ContextParams(n_ctx=128, n_batch=0), "n_batch"),
        ("deepseek2", ContextParams(type_k="q8_0", type_v="f16"), "must be equal"),
        ("llama", ContextParams(n_seq_max=64, n_batch=32), "n_batch is 32: 64 sequences"),
    ],
)
def test_what_llama_cpp_refuses_is_rejected(model: str, context: ContextParams, words: str, shape_of: ShapeOf) -> None:
    with pytest.raises(Rejected, match=words):
        footprint(shape_of(model), on(1), context, CHECKED_BUILD)


def test_heads_that_do_not_divide_into_blocks(tmp_path: Path) -> None:
    from dataclasses import replace

    shape = read_shape(write_model(replace(SMALL["llama"], head=24), tmp_path / "m.gguf", vocabulary=False))
    with pytest.raises(Rejected, match="multiple of 32"):
        footprint(shape, on(1), ContextParams(type_k="q8_0"), CHECKED_BUILD)


def test_the_abort_on_phi3_is_avoided(tmp_path: Path) -> None:
    from dataclasses import replace

    shape = read_shape(write_model(replace(SMALL["llama"], arch="phi3"), tmp_path / "phi.gguf", vocabulary=False))
    bad = ContextParams(n_seq_max=2, type_k="q8_0", type_v="q8_0")
    with pytest.raises(Rejected, match="kv_unified"):
        footprint(shape, on(1), bad, CHECKED_BUILD)
    footprint(shape, on(1), ContextParams(n_seq_max=2, type_k="q8_0", type_v="q8_0", kv_unified=True), CHECKED_BUILD)
    footprint(shape, on(1), ContextParams(n_seq_max=1, type_k="q8_0", type_v="q8_0"), CHECKED_BUILD)


@pytest.mark.parametrize("split", [(1.0,), (1.0, 1.0, 1.0), (), (-1.0, 2.0), (0.0, 0.0)])
def test_a_split_must_fit_the_devices(split: tuple[float, ...], shape_of: ShapeOf) -> None:
    layout = Layout((DeviceSpec("a"), DeviceSpec("b")), -1, split)
    with pytest.raises(Rejected, match="tensor_split"):
        footprint(shape_of("llama"), layout, ContextParams(), CHECKED_BUILD)


def test_layers_go_where_llama_cpp_sends_them() -> None:
    two = (DeviceSpec("a"), DeviceSpec("b"))
    assert assign_layers(Layout(two, -1, (3, 2)), 4) == (0, 0, 0, 1, 1)
    assert assign_layers(Layout(two, 3, (1, 2)), 4) == (HOST, HOST, 0, 1, 1)
    assert assign_layers(Layout(two, 99, (0, 1)), 2) == (1, 1, 1)
    assert assign_layers(Layout(two, 0, (1, 1)), 2) == (HOST,) * 3
    assert assign_layers(Layout((), -1, ()), 2) == (HOST,) * 3


@settings(deadline=None, derandomize=True)
@given(n_layer=st.integers(1, 120), counts=st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_layer_counts_are_honoured_exactly(n_layer: int, counts: list[int]) -> None:
    """Arriero gives layer counts that sum to the offloaded layers: float32 must not move one of them."""
    total = sum(counts)
    if not 0 < total <= n_layer + 1:
        return
    layout = Layout(tuple(DeviceSpec(str(i)) for i in range(len(counts))), total, tuple(map(float, counts)))
    places = assign_layers(layout, n_layer)
    assert [places.count(i) for i in range(len(counts))] == counts
    assert places.count(HOST) == n_layer + 1 - total


@settings(deadline=None, derandomize=True)
@given(split=st.lists(st.integers(1, 9), min_size=1, max_size=4), n_gpu_layers=st.integers(0, 7))
def test_no_byte_of_the_weights_is_lost(split: list[int], n_gpu_layers: int, shape_of: ShapeOf) -> None:
    shape = shape_of("mixtral")
    layout = Layout(tuple(DeviceSpec(str(i), "rpc") for i in range(len(split))), n_gpu_layers, tuple(map(float, split)))
    result = footprint(shape, layout, ContextParams(), CHECKED_BUILD)
    everywhere = sum(device.weights_bytes for device in result.devices) + result.host.weights_bytes
    assert everywhere == shape.weights_bytes
    cached = sum(device.kv_bytes for device in result.devices) + result.host.kv_bytes
    assert cached == footprint(shape, Layout(), ContextParams(), CHECKED_BUILD).host.kv_bytes


def test_tied_embeddings_are_counted_twice_when_the_output_leaves_the_host(shape_of: ShapeOf) -> None:
    shape = shape_of("llama-3.2-3b")
    here = footprint(shape, Layout(), ContextParams(), CHECKED_BUILD)
    there = footprint(shape, on(1), ContextParams(), CHECKED_BUILD)
    spec = GOLDEN["llama-3.2-3b"]
    embedding = spec.n_embd * spec.n_vocab // 256 * 210
    assert there.devices[0].weights_bytes + there.host.weights_bytes == here.host.weights_bytes + embedding


def test_experts_on_the_host(shape_of: ShapeOf) -> None:
    shape = shape_of("qwen3-30b-a3b")
    all_there = footprint(shape, on(1, 1), ContextParams(), CHECKED_BUILD)
    apart = footprint(shape, on(1, 1, experts_on_host=True), ContextParams(), CHECKED_BUILD)
    moved = sum(d.weights_bytes for d in all_there.devices) - sum(d.weights_bytes for d in apart.devices)
    assert moved == shape.experts_bytes
    assert apart.host.weights_bytes == all_there.host.weights_bytes + moved


def test_prediction_layers_take_a_place_but_no_memory(shape_of: ShapeOf) -> None:
    with_them, without = shape_of("qwen3next-nextn"), shape_of("qwen3next")
    assert with_them.n_layer_all == without.n_layer_all + 1
    a, b = (footprint(shape, on(1), ContextParams(), CHECKED_BUILD) for shape in (with_them, without))
    assert a.devices[0].weights_bytes == b.devices[0].weights_bytes
    assert a.devices[0].kv_bytes == b.devices[0].kv_bytes


def test_cuda_pads_what_rpc_does_not(shape_of: ShapeOf) -> None:
    shape = shape_of("llama-q8")
    plain, cuda = (
        footprint(shape, on(1, kind=kind), ContextParams(), CHECKED_BUILD).devices[0] for kind in ("rpc", "cuda")
    )
    assert cuda.weights_bytes > plain.weights_bytes


def test_cuda_keeps_f16_copies_of_a_quantised_cache(shape_of: ShapeOf) -> None:
    """FLASH_ATTN_EXT on CUDA converts one layer's K and V: 2 bytes per element of all cells."""
    shape = shape_of("llama-3.1-8b")
    context = ContextParams(n_ctx=131072, type_k="q8_0", type_v="q8_0")
    cuda, rpc = (footprint(shape, on(1, kind=kind), context, CHECKED_BUILD).devices[0] for kind in ("cuda", "rpc"))
    assert cuda.compute_bytes >= rpc.compute_bytes
    assert cuda.compute_bytes > 704_000_000  # measured with CUDA's sizes: 704,737,280


def test_cuda_multiplies_by_host_weights(shape_of: ShapeOf) -> None:
    """With nothing offloaded, CUDA still runs large matrix products and copies one weight at a time."""
    shape = shape_of("llama-3.1-8b")
    layout = Layout((DeviceSpec("gpu0", "cuda"),), 0, (1,))
    result = footprint(shape, layout, ContextParams(), CHECKED_BUILD)
    assert result.devices[0].weights_bytes == 0
    assert 701_997_056 <= result.devices[0].compute_bytes < 701_997_056 * 1.1
    assert (
        footprint(shape, Layout(layout.devices, 0, (1,)), ContextParams(n_ubatch=16), CHECKED_BUILD)
        .devices[0]
        .compute_bytes
        == 0
    )


def test_a_pipeline_holds_its_inputs_four_times(shape_of: ShapeOf) -> None:
    shape = shape_of("llama-3.1-8b")
    context = ContextParams(n_ctx=131072)
    single, double = footprint(shape, on(1), context, CHECKED_BUILD), footprint(shape, on(1, 1), context, CHECKED_BUILD)
    masks = 4 * 512 * 131072 * 2
    assert double.host.compute_bytes - single.host.compute_bytes > 0.75 * masks
    assert double.devices[0].compute_bytes > masks


def test_parts_are_found_from_any_of_them(tmp_path: Path) -> None:
    whole = Gguf()
    whole.set("general.architecture", "llama")
    for key, value in (("block_count", 2), ("context_length", 512), ("embedding_length", 64), ("vocab_size", 99)):
        whole.set(f"llama.{key}", value)
    for key, value in (("head_count", 4), ("head_count_kv", 2), ("layer_norm_rms_epsilon", 1e-5)):
        whole.set(f"llama.attention.{key}", value)
    for no in range(3):
        part = Gguf(metadata=dict(whole.metadata) if no == 0 else {})
        part.metadata |= {"split.no": (2, no), "split.count": (2, 3), "split.tensors.count": (5, 3)}
        part.tensors = [(f"blk.{no % 2}.part{no}.weight", (64, 64), "f16")]
        part.write(tmp_path / f"big-{no + 1:05d}-of-00003.gguf")
    shapes = [read_shape(tmp_path / f"big-{no:05d}-of-00003.gguf") for no in (1, 2, 3)]
    assert {shape.weights_bytes for shape in shapes} == {3 * 64 * 64 * 2}
    assert shapes[0].paths == shapes[2].paths
    assert len(shapes[0].paths) == 3

    (tmp_path / "big-00002-of-00003.gguf").rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(InvalidGGUF, match="part 2 of 3 is missing"):
        read_shape(tmp_path / "big-00001-of-00003.gguf")
    with pytest.raises(InvalidGGUF, match="rename"):
        read_shape(tmp_path / "elsewhere.gguf")


def test_unknown_architectures_say_so_and_are_bounded_generously(tmp_path: Path) -> None:
    from dataclasses import replace

    known = read_shape(write_model(SMALL["qwen3"], tmp_path / "known.gguf", vocabulary=False))
    strange = replace(SMALL["qwen3"], arch="qwen9")
    unknown = read_shape(write_model(strange, tmp_path / "unknown.gguf", vocabulary=False))
    assert known.known_architecture
    assert not unknown.known_architecture
    a, b = (footprint(shape, on(1), ContextParams(), CHECKED_BUILD).devices[0] for shape in (known, unknown))
    assert b.kv_bytes >= 2 * a.kv_bytes
    assert b.compute_bytes >= 2 * a.compute_bytes
    assert b.weights_bytes >= a.weights_bytes


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("llama.block_count", 0, "block_count"),
        ("llama.block_count", 100_000, "block_count"),
        ("llama.embedding_length", 0, "embedding_length"),
        ("llama.embedding_length", "wide", "not a whole number"),
        ("llama.attention.head_count", [1, 2, 3], "3 entries for 6 layers"),
        ("llama.attention.head_count", [1.5] * 6, "sensible whole numbers"),
        ("general.architecture", "", "general.architecture"),
    ],
)
def test_nonsense_in_the_metadata_is_refused(key: str, value: object, words: str, tmp_path: Path) -> None:
    file = Gguf()
    file.set("general.architecture", "llama")
    for name, number in (("block_count", 6), ("context_length", 512), ("embedding_length", 64)):
        file.set(f"llama.{name}", number)
    file.set(key, value)
    file.tensors = [("token_embd.weight", (64, 10), "f16")]
    with pytest.raises(InvalidGGUF, match=words):
        read_shape(file.write(tmp_path / "m.gguf"))


def test_a_vocabulary_is_no_model(tmp_path: Path) -> None:
    file = Gguf()
    file.set("general.architecture", "llama")
    for name, number in (("block_count", 6), ("context_length", 512), ("embedding_length", 64)):
        file.set(f"llama.{name}", number)
    with pytest.raises(InvalidGGUF, match="no tensors"):
        read_shape(file.write(tmp_path / "m.gguf"))


def test_shapes_travel_between_processes(shape_of: ShapeOf) -> None:
    shape = shape_of("gemma3")
    copy = pickle.loads(pickle.dumps(shape))
    assert footprint(copy, on(1, 2), ContextParams(), CHECKED_BUILD) == footprint(
        shape, on(1, 2), ContextParams(), CHECKED_BUILD
    )
    assert len({shape, shape}) == 1


def test_what_embeds_only(shape_of: ShapeOf, tmp_path: Path) -> None:
    from dataclasses import replace

    assert not shape_of("qwen3").is_embedding_only
    file = Gguf()
    file.set("general.architecture", "qwen3")
    for key, value in (("block_count", 1), ("context_length", 512), ("embedding_length", 64), ("pooling_type", 3)):
        file.set(f"qwen3.{key}", value)
    file.set("qwen3.attention.layer_norm_rms_epsilon", 1e-5)
    file.tensors = [("token_embd.weight", (64, 10), "f16")]
    assert read_shape(file.write(tmp_path / "embedding.gguf")).is_embedding_only
    bert = write_model(replace(SMALL["llama"], arch="bert"), tmp_path / "bert.gguf", vocabulary=False)
    assert read_shape(bert).is_embedding_only
    assert footprint(read_shape(bert), on(1), ContextParams(), CHECKED_BUILD).devices[0].kv_bytes == 0


def test_a_table_that_is_read_lazily_is_not_resident(tmp_path: Path) -> None:
    """Above 4 GiB, llama.cpp maps gemma4's embeddings per layer, and touches the rows that it needs."""
    spec = replace(SMALL["gemma4"], n_vocab=3_000_000)
    smaller, larger = (
        read_shape(write_model(replace(spec, per_layer=width), tmp_path / f"{width}.gguf", vocabulary=False))
        for width in (64, 128)
    )
    small, large = (
        footprint(shape, Layout(), ContextParams(), CHECKED_BUILD).host.weights_bytes for shape in (smaller, larger)
    )
    table_bytes = 2 * 9 * 64 * 3_000_000
    assert table_bytes < 4 * GIB < 2 * table_bytes
    assert large < small - table_bytes + 2 * MIB


ODD_NAMES = ["blk.².attn_q.weight", "blk.٣.attn_q.weight", "blk." + "9" * 40 + ".attn_q.weight", "blk.x"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_tensors_with_odd_names_belong_to_no_layer(name: str, tmp_path: Path) -> None:
    assert split_name(name) == (-1, name)
    gguf = model_file(SMALL["llama"], "llama")
    gguf.tensors.append((name, (32, 32), "f32"))
    assert read_shape(gguf.write(tmp_path / "model.gguf")).n_layer_all == SMALL["llama"].n_layer


def test_weights_of_shapes_that_no_graph_has_are_bounded(tmp_path: Path) -> None:
    latent, experts = (model_file(SMALL[name], name) for name in ("deepseek2", "qwen3moe"))
    latent.tensors = [
        (name, (ne[0], ne[1] // 2, *ne[2:]) if "attn_k_b" in name else ne, kind) for name, ne, kind in latent.tensors
    ]
    experts.tensors = [(name, ne[:1] if "ffn_down_exps" in name else ne, kind) for name, ne, kind in experts.tensors]
    for number, gguf in enumerate((latent, experts)):
        shape = read_shape(gguf.write(tmp_path / f"{number}.gguf"))
        for context in (ContextParams(n_ctx=512), ContextParams(n_ctx=512, flash_attn="off")):
            assert footprint(shape, Layout(), context, CHECKED_BUILD).host.compute_bytes > 0
        assert not computes_exactly(shape, CHECKED_BUILD)
