"""What the catalogue may ask of a place: machines, GPUs, neighbours, speed, and other ways to load a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from scenario import LARGE, MEDIUM, SMALL, Scenario, gpu, shape

from scheduler.choice.workload import Workload
from scheduler.cluster.facts import DeviceFacts
from scheduler.cluster.models import Models
from scheduler.config import Reserves, parse_catalogue
from scheduler.costs.footprint import footprint
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.host import host_memory
from scheduler.costs.params import ContextParams, Layout, Rates
from scheduler.errors import Impossible, Rejected

M = {"m": MEDIUM}


def wants(name: str = "m", **wishes: Any) -> dict[str, Any]:
    return {"models": {name: {"path": f"{name}.gguf", **wishes}}}


def three_boxes(models: dict[str, tuple[int, ...]], catalogue: dict[str, Any]) -> Scenario:
    """box has no GPU; left and right have one of 8 GiB each."""
    s = Scenario([], models, catalogue=catalogue)
    for name in ("left", "right"):
        s.add_node(name, [gpu("8GiB", f"gpu-{name}")])
    return s


def card(label: str, bandwidth: float, size: str = "24GiB") -> DeviceFacts:
    return replace(gpu(size, label, kind="cuda"), rates=Rates(bandwidth, 20e12))


def machine(
    models: dict[str, tuple[int, ...]], catalogue: dict[str, Any], *cards: DeviceFacts, **more: Any
) -> Scenario:
    return Scenario(cards, models, catalogue=catalogue, rates=Rates(40e9, 0.5e12), **more)


@pytest.mark.parametrize("name", ["left", "right"])
def test_only_on_machines_of_that_name(name: str) -> None:
    s = three_boxes(M, wants(nodes=[name]))
    s.run("m")
    assert s.node("m") == name


@pytest.mark.parametrize("name", ["left", "right"])
def test_only_on_machines_with_that_label(name: str) -> None:
    s = three_boxes(M, wants(labels={"room": "attic"}) | {"labels": {name: {"room": "attic"}}})
    s.run("m")
    assert s.node("m") == name


def test_where_no_machine_has_the_label_it_is_refused_with_the_wish() -> None:
    s = three_boxes(M, wants(labels={"room": "cellar"}))
    refused = s.ask("m")
    assert isinstance(s.error(refused), Impossible) and "where room is cellar" in s.why(refused)


def test_near_to_a_model_that_is_loaded() -> None:
    models = {"first": MEDIUM, "second": SMALL}
    s = three_boxes(models, wants("second", near=["first"]))
    s.run("first")
    s.run("second")
    assert s.node("second") == s.node("first")


def test_near_to_a_model_that_is_not_loaded_is_anywhere() -> None:
    s = three_boxes({"first": MEDIUM, "second": SMALL}, wants("second", near=["first"]))
    s.run("second")
    assert s.tier("second") == "one GPU"


def test_near_to_a_model_on_a_machine_that_could_never_hold_it_is_anywhere() -> None:
    s = Scenario(
        [gpu("3GiB")], {"first": SMALL, "second": LARGE}, catalogue=wants("second", near=["first"], spill=False)
    )
    s.run("first")
    s.add_node("other", [gpu("24GiB", "gpu-other")])
    s.run("second")
    assert (s.node("first"), s.node("second")) == ("box", "other")


@pytest.mark.parametrize("who", ["first", "second"])
def test_never_on_one_gpu_whoever_of_the_two_says_so(who: str) -> None:
    other = "second" if who == "first" else "first"
    catalogue = wants(who, not_with=[other])
    s = Scenario([gpu("8GiB"), gpu("6GiB", "gpu1")], {"first": MEDIUM, "second": MEDIUM}, catalogue=catalogue)
    s.run("first")
    s.run("second")
    assert s.where("first") != s.where("second") and s.loaded_models() == {"first", "second"}


def test_on_the_only_gpu_one_of_two_that_must_not_share_it_goes() -> None:
    s = Scenario([gpu("8GiB")], {"a": MEDIUM, "b": MEDIUM}, catalogue=wants("a", not_with=["b"], spill=False))
    s.run("b")
    s.wait(10)
    s.run("a")
    assert s.evicted() == ["b"] and s.loaded_models() == {"a"}


def test_other_contexts_of_an_embedding_model_hold_whole_sequences_in_one_batch() -> None:
    plain = shape(*SMALL)
    embeds = replace(plain, arch=replace(plain.arch, pools=True))
    catalogue = parse_catalogue(wants(n_ctx=8192, alternatives=[{"n_ctx": 2048}, {"type_k": "q8_0"}]))
    models = Models(catalogue)
    contexts = (
        models.context(models.by_name["m"], embeds, None),
        *models.alternatives(models.by_name["m"], embeds, None),
        Workload("m", embeds, ContextParams(), Reserves()).with_n_ctx(ContextParams(), 16384).context,
    )
    assert [(each.n_ctx, each.n_batch, each.n_ubatch) for each in contexts] == [
        (n_ctx, n_ctx, n_ctx) for n_ctx in (8192, 2048, 8192, 16384)
    ]


def test_drafts_are_in_the_plan_where_guesses_can_be_taken_back() -> None:
    models = Models(parse_catalogue(wants(spec_type="ngram-simple", n_ctx=4096)))
    plain = Models(parse_catalogue(wants(n_ctx=4096)))
    llama = shape(*MEDIUM)
    without = plain.context(plain.by_name["m"], llama, None)
    context = models.context(models.by_name["m"], llama, None)
    assert (without.n_outputs_max, context.n_outputs_max) == (4, 19)
    assert replace(context, spec_type="none", n_outputs_max=4) == without
    before, grown = (
        host_memory(
            llama, Layout(), each, footprint(llama, Layout(), each, CHECKED_BUILD), process_bytes=0
        ).growing_bytes
        for each in (without, context)
    )
    assert grown - before == 15 * 4 * (32000 + llama.arch.n_embd_out) + 200 * 4096

    windows = replace(llama, arch=replace(llama.arch, n_swa=1024))
    assert models.context(models.by_name["m"], windows, None) == plain.context(plain.by_name["m"], windows, None)
    compressed = replace(llama.arch.layers[0], compression=4)
    keys = replace(llama, arch=replace(llama.arch, layers=(compressed, *llama.arch.layers[1:])))
    assert models.context(models.by_name["m"], keys, None) == plain.context(plain.by_name["m"], keys, None)
    embeds = replace(llama, arch=replace(llama.arch, pools=True))
    assert models.context(models.by_name["m"], embeds, None) == plain.context(plain.by_name["m"], embeds, None)


def test_a_model_is_not_its_own_neighbour() -> None:
    with pytest.raises(Rejected, match="names itself in near or not_with"):
        parse_catalogue(wants(not_with=["m"]))


@pytest.mark.parametrize(("placement", "where"), [("pack", ["gpu0"]), ("spread", ["gpu1"])])
def test_small_models_are_packed_or_spread(placement: str, where: list[str]) -> None:
    s = Scenario([gpu("4GiB"), gpu("8GiB", "gpu1")], M, catalogue={"policy": {"placement": placement}})
    s.run("m")
    assert s.where("m") == where


def test_a_speed_that_only_one_card_has() -> None:
    """2.4 GiB per token: some 380 tokens/s at 1 TB/s, 75 at 200 GB/s."""
    slow, fast = card("gpu0", 200e9, "8GiB"), card("gpu1", 1e12, "12GiB")
    s = machine(M, wants(min_tokens_per_s=200), slow, fast)
    s.run("m")
    assert s.where("m") == ["gpu1"]
    refusing = machine(M, wants(min_tokens_per_s=200), slow)
    refused = refusing.ask("m")
    assert isinstance(refusing.error(refused), Impossible)
    assert "with at least 200 tokens/s" in refusing.why(refused)
    assert "tokens/s are predicted, 200 are wanted" in refusing.why(refused)


def test_another_context_is_taken_where_the_first_would_not_be_on_gpus() -> None:
    """11.1 GiB of weights and 1 GiB of cache: on a smaller card, the weights and a smaller cache."""
    alternatives = [{"type_k": "q8_0", "type_v": "q8_0"}, {"n_ctx": 2048}]
    catalogue = wants("large", n_ctx=8192, alternatives=alternatives)
    s = Scenario([gpu("20GiB")], {"large": LARGE}, catalogue=catalogue)
    s.run("large")
    assert s.replica("large").placement.context.type_k == "f16" and s.replica("large").n_ctx == 8192
    less = Scenario([gpu("12000MiB")], {"large": LARGE}, catalogue=catalogue)
    less.run("large")
    assert less.tier("large") == "one GPU"
    assert (less.replica("large").placement.context.type_k, less.replica("large").n_ctx) == ("q8_0", 8192)
    least = Scenario([gpu("11500MiB")], {"large": LARGE}, catalogue=catalogue)
    least.run("large")
    assert (least.tier("large"), least.replica("large").n_ctx) == ("one GPU", 2048)
    least.run("large")
    assert len(least.started) == 1  # it serves requests that name no length


def test_an_alternative_holds_what_was_asked_for() -> None:
    catalogue = wants("large", n_ctx=8192, alternatives=[{"n_ctx": 2048}])
    s = Scenario([gpu("15GiB")], {"large": LARGE}, catalogue=catalogue)
    s.run("large", n_ctx=4096)
    assert s.replica("large").n_ctx >= 4096


def test_auto_is_the_longest_context_that_keeps_the_layout() -> None:
    sizes = {}
    for size in ("4GiB", "5GiB", "6GiB"):
        s = Scenario([gpu(size)], M, catalogue=wants(n_ctx="auto"))
        s.run("m")
        sizes[size] = s.replica("m").n_ctx
        placement = s.replica("m").placement
        assert placement.tier == "one GPU" and placement.device_bytes[0] <= gpu(size).total_bytes
        # 256 tokens more would not fit, or are more than it was trained for
        longer = s.replica("m").n_ctx + 256
        trained = s.core.models.by_name["m"].shape.n_ctx_train  # type: ignore[union-attr]
        cell = placement.device_bytes[0] // placement.context.n_ctx
        assert longer > trained or placement.device_bytes[0] + 256 * cell > gpu(size).total_bytes - 2 * 256 * cell  # type: ignore[operator]
    assert 8192 <= sizes["4GiB"] <= sizes["5GiB"] <= sizes["6GiB"]
    s.run("m")
    assert len(s.started) == 1


def many_boxes(models: dict[str, tuple[int, ...]], catalogue: dict[str, Any], big: int = 2) -> Scenario:
    """Twelve machines, the first of them with GPUs of 14 GiB, the others with 8 GiB."""
    s = Scenario([], models, catalogue=catalogue)
    for number in range(12):
        s.add_node(f"n{number}", [gpu("14GiB" if number < big else "8GiB", f"gpu-{number}")])
    return s


def test_of_many_machines_the_one_that_is_named_is_found() -> None:
    s = many_boxes(M, wants(gpus=["n9/gpu-9"], spill=False))
    s.run("m")
    assert s.node("m") == "n9"


def test_what_fits_only_on_machines_that_are_busy_waits_for_them_however_many_others_there_are() -> None:
    catalogue = {"models": {name: {"path": f"{name}.gguf", "spill": False} for name in ("x", "y", "large")}}
    s = many_boxes({"x": LARGE, "y": LARGE, "large": LARGE}, catalogue)
    held = [s.ask("x"), s.ask("y")]
    assert {s.node("x"), s.node("y")} == {"n0", "n1"}
    waits = s.ask("large")
    s.wait(1)
    assert s.waits(waits), s.why(waits)
    s.done(held[0])
    s.wait(10)
    assert waits in s.grants


def test_a_model_whose_neighbour_is_where_its_file_is_not_is_loaded_all_the_same() -> None:
    s = Scenario([gpu("4GiB")], {"first": MEDIUM, "second": SMALL}, catalogue=wants("second", near=["first"]))
    s.report_node("box", has=["second"])
    s.add_node("other", [gpu("4GiB", "gpu-other")], has=["first"])
    s.run("first")
    s.run("second")
    assert (s.node("first"), s.node("second")) == ("other", "box")
