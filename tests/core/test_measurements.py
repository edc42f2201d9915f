"""What real loads took is remembered, across restarts, and used where it says something else than the formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scenario import Scenario, gpu, shape

from scheduler.config import Reserves
from scheduler.costs.footprint import footprint
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.measurements import OVERHEAD_MARGIN_BYTES, ROUNDING_BYTES, Measurements, Record, load_key
from scheduler.costs.params import ContextParams, DeviceBytes, DeviceSpec, Footprint, HostBytes, Layout
from scheduler.units import GIB, MIB

M = (24, 2048, 5632)
MODEL = shape(*M)
ONE = Layout((DeviceSpec("d0", "rpc"),), -1, (1.0,))
CONTEXT = ContextParams()
PREDICTED = footprint(MODEL, ONE, CONTEXT, CHECKED_BUILD)


def taking(compute_bytes: int) -> Footprint:
    """The prediction, but for the compute buffer of the device."""
    return replace(PREDICTED, devices=(replace(PREDICTED.devices[0], compute_bytes=compute_bytes),))


def after(*buffers: Footprint, layout: Layout = ONE) -> Measurements:
    """A memory of these loads, that has been through a restart."""
    memory = Measurements()
    records = [memory.loaded(MODEL, layout, CONTEXT, "1.0", each) for each in buffers]
    return Measurements(records[-1:])


@pytest.mark.parametrize("share", [0.5, 1.5])
def test_a_measured_buffer_replaces_a_prediction_that_was_off(share: float) -> None:
    truth = int(PREDICTED.devices[0].compute_bytes * share)
    load = after(taking(truth)).load(MODEL, ONE, CONTEXT, "1.0")
    assert load is not None
    assert load.settle(PREDICTED, ONE).devices[0].compute_bytes == truth + ROUNDING_BYTES


def test_a_report_within_its_rounding_confirms_the_prediction() -> None:
    load = after(taking(PREDICTED.devices[0].compute_bytes + ROUNDING_BYTES)).load(MODEL, ONE, CONTEXT, "1.0")
    assert load is not None and load.settle(PREDICTED, ONE) == PREDICTED


def test_only_the_same_load_is_remembered() -> None:
    memory = after(taking(GIB))
    assert memory.load(MODEL, replace(ONE, devices=(DeviceSpec("another name", "rpc"),)), CONTEXT, "1.0")
    assert memory.load(MODEL, replace(ONE, devices=(DeviceSpec("d0", "cuda"),)), CONTEXT, "1.0") is None
    assert memory.load(MODEL, replace(ONE, n_gpu_layers=3), CONTEXT, "1.0") is None
    assert memory.load(MODEL, ONE, replace(CONTEXT, n_ctx=8192), "1.0") is None
    assert memory.load(MODEL, ONE, CONTEXT, "1.1") is None
    assert memory.load(shape(24, 2048, 5504), ONE, CONTEXT, "1.0") is None


def test_splits_that_put_every_layer_in_the_same_place_are_the_same() -> None:
    two = Layout((DeviceSpec("d0", "rpc"), DeviceSpec("d1", "rpc")), -1, (1.0, 1.0))
    same, other = replace(two, tensor_split=(12.5, 12.5)), replace(two, tensor_split=(1.0, 3.0))
    keys = [load_key(MODEL, layout, CONTEXT, "1.0") for layout in (two, same, other)]
    assert keys[0] == keys[1] != keys[2]


def test_a_cuda_device_is_not_given_less_before_it_is_known_what_it_needs_besides() -> None:
    cuda = Layout((DeviceSpec("d0", "cuda"),), -1, (1.0,))
    predicted = footprint(MODEL, cuda, CONTEXT, CHECKED_BUILD)
    memory = Measurements()
    less = replace(predicted, devices=(replace(predicted.devices[0], compute_bytes=MIB),))
    memory.loaded(MODEL, cuda, CONTEXT, "1.0", less)
    load = memory.load(MODEL, cuda, CONTEXT, "1.0")
    assert load is not None and load.settle(predicted, cuda) == predicted
    assert memory.held(load_key(MODEL, cuda, CONTEXT, "1.0"), 0, 300 * MIB) is not None
    load = memory.load(MODEL, cuda, CONTEXT, "1.0")
    assert load is not None and load.settle(predicted, cuda).devices[0].compute_bytes == MIB + ROUNDING_BYTES


@pytest.mark.parametrize(
    "record",
    [
        Record("load", "not json", {}),
        Record("load", '["a", "1.0"]', {"buffers": {"devices": [], "host": {"kv_bytes": -1}}, "outside_bytes": []}),
        Record("load", '["a", "1.0"]', {"buffers": {"devices": [{}], "host": {}}, "outside_bytes": [], "loads": 1}),
        Record("out_of_memory", "a", {"extra_bytes": "many"}),
        Record("overhead", "a", {}),
        Record("of a later release", "a", {"x": 1}),
    ],
)
def test_records_that_make_no_sense_are_left_out(record: Record) -> None:
    assert len(Measurements([record])) == 0


def test_a_second_load_is_given_what_the_first_really_took() -> None:
    s = Scenario([gpu("8GiB")], {"a": M})
    s.run("a")
    first = s.replica("a").placement
    s.reported["a"] = Footprint((DeviceBytes(first.device_bytes[0] + 32 * MIB),), HostBytes())
    s.unload("a")
    s.run("a")  # takes 32 MiB more than was predicted
    assert s.announced("footprint_exceeded")
    s.unload("a")
    s.run("a")
    assert s.replica("a").placement.device_bytes[0] >= first.device_bytes[0] + 32 * MIB
    again = Scenario([gpu("8GiB")], {"a": M}, records=s.remembered())
    again.run("a")
    assert again.replica("a").placement.device_bytes == s.replica("a").placement.device_bytes


def test_running_out_of_memory_is_remembered_across_a_restart() -> None:
    s = Scenario([gpu("8GiB")], {"a": M}, auto=False)
    s.ask("a")
    first = s.replica("a").placement
    s.fail_load("a", "out_of_memory")
    again = Scenario([gpu("8GiB")], {"a": M}, records=s.remembered(), auto=False)
    again.ask("a")
    assert again.replica("a").placement.device_bytes[0] >= first.device_bytes[0] + 64 * MIB


def test_a_pause_gives_the_prediction_another_chance_for_good() -> None:
    s = Scenario([gpu("8GiB")], {"a": M}, auto=False)
    s.ask("a")
    for _ in range(3):
        s.fail_load("a", "out_of_memory")
    again = Scenario([gpu("8GiB")], {"a": M}, records=s.remembered(), auto=False)
    again.ask("a")
    assert again.replica("a").placement.device_bytes == s.started[0].placement.device_bytes


def test_what_a_card_loses_besides_the_buffers_is_learned_from_replicas_that_served() -> None:
    s = Scenario([gpu("8GiB", kind="cuda")], {"a": M, "b": (24, 2048, 5504)}, tells_processes=True)
    request = s.ask("a")
    first = s.replica("a").placement
    assert first.overhead_bytes == (Reserves().cuda_overhead_bytes,)
    runner = s.runners[s.replica("a").replica_id]
    runner.device_bytes[first.device_ids[0]] -= 200 * MIB  # the process holds less than the reserve allows for
    s.wait(2)
    assert not any(record.kind == "overhead" for record in s.remembered())  # it has not served yet
    s.done(request)
    s.wait(2)
    s.run("b")
    seen = Reserves().cuda_overhead_bytes - 200 * MIB
    assert s.replica("b").placement.overhead_bytes == (seen + OVERHEAD_MARGIN_BYTES,)
    s.unload("a")
    s.run("a")
    assert s.replica("a").placement.overhead_bytes == (seen,)


@pytest.mark.parametrize(("preflight", "asks"), [("unverified", True), ("always", True), ("never", False)])
def test_llama_cpp_is_asked_before_a_first_load_where_the_formulas_were_not_checked(preflight: str, asks: bool) -> None:
    s = Scenario([gpu("3GiB")], {"a": M}, catalogue={"policy": {"preflight": preflight}}, llama_build="")
    s.run("a")
    assert [command.preflight for command in s.started] == [asks]
    s.unload("a")
    s.run("a")
    assert [command.preflight for command in s.started] == [asks, False]  # it is known by now


@pytest.mark.parametrize(
    ("build", "preflight", "asks"),
    [("0.3.36", "unverified", False), ("0.3.36", "always", True), ("0.3.99", "unverified", True)],
)
def test_what_was_checked_with_this_release_is_not_asked_about(build: str, preflight: str, asks: bool) -> None:
    s = Scenario([gpu("3GiB")], {"a": M}, catalogue={"policy": {"preflight": preflight}}, llama_build=build)
    s.run("a")
    assert [command.preflight for command in s.started] == [asks]


def test_llama_cpp_is_not_asked_about_what_lies_in_host_ram_alone() -> None:
    s = Scenario([], {"a": M}, catalogue={"policy": {"preflight": "always"}})
    s.run("a")
    assert [command.preflight for command in s.started] == [False]


def test_what_llama_cpp_would_take_is_reserved_the_next_time_and_no_failure() -> None:
    s = Scenario([gpu("3GiB")], {"a": M}, auto=False)
    request = s.ask("a")
    first = s.started[-1]
    would_take = s.report(first)
    [share] = would_take.devices
    more = replace(would_take, devices=(replace(share, compute_bytes=share.compute_bytes + 32 * MIB),))
    s.fail_load("a", "underestimated", "it would take more", more)
    second = s.started[-1]
    assert second is not first and not second.preflight
    assert second.placement.device_bytes[0] >= first.placement.device_bytes[0] + 32 * MIB
    assert not s.core.models.by_name["a"].history.pauses and s.waits(request)
    s.finish_load("a")
    assert request in s.grants


def test_an_answer_of_llama_cpp_is_not_counted_as_a_load() -> None:
    memory = Measurements()
    memory.loaded(MODEL, ONE, CONTEXT, "1.0", PREDICTED, times=0)
    memory.loaded(MODEL, ONE, CONTEXT, "1.0", PREDICTED)
    load = memory.load(MODEL, ONE, CONTEXT, "1.0")
    assert load is not None and load.loads == 1
