"""How much is free: reserves, bookings, and what belongs to others."""

from __future__ import annotations

import pytest
from scenario import SMALL, Scenario, gpu

from scheduler.cluster.free_memory import Room, View, _estimate
from scheduler.cluster.ledger import host_account
from scheduler.units import GIB, DeviceId, NodeId, ReplicaId

M = (24, 2048, 5632)
BOX, GPU0 = NodeId("box"), DeviceId("id-gpu0")


@pytest.mark.parametrize(
    ("before", "used", "least", "most", "foreign"),
    [
        (0, 10, 10, 10, 0),  # all of it is ours
        (0, 12, 10, 10, 2),
        (2, 7, 0, 10, 2),  # a load under way explains the rest: the former estimate holds
        (2, 1, 0, 10, 1),  # cannot be more than what is used
        (2, 15, 0, 10, 5),  # cannot be less than what ours may be at most
        (0, 8, 10, 10, 0),  # a replica that takes less than predicted
    ],
)
def test_foreign_memory_is_what_ours_cannot_explain(
    before: int, used: int, least: int, most: int, foreign: int
) -> None:
    assert _estimate(before, used, least, most) == foreign


def test_a_view_adds_up_what_the_victims_give_back() -> None:
    a, b = ReplicaId("a"), ReplicaId("b")
    view = View(
        Room({GPU0: 1}, host_bytes=2, active=0),
        {a: Room({GPU0: 10}, 20, 1), b: Room({}, 5, 1)},
    )
    assert view.without([]) == view.staying
    assert view.without([a, b]) == Room({GPU0: 11}, 27, 2)


def test_nothing_is_free_twice() -> None:
    s = Scenario([gpu("6GiB")], {"a": M, "b": M, "c": M}, auto=False)
    request = s.ask("a")
    s.finish_load("a")
    s.done(request)
    s.ask("b")  # loading: nothing of it shows yet
    one = s.replica("a").placement.device_bytes[0]
    s.read_devices()
    assert s.core.rooms.now(BOX).devices[GPU0] == 6 * GIB - 2 * one
    s.allocate(s.started[-1], share=0.5)
    s.read_devices()
    assert s.core.rooms.now(BOX).devices[GPU0] == 6 * GIB - 2 * one
    s.unload("a")
    assert s.core.rooms.now(BOX).devices[GPU0] == 6 * GIB - 2 * one
    assert s.core.rooms.without(BOX, []).devices[GPU0] == 6 * GIB - one
    s.finish_stops()
    assert s.core.rooms.now(BOX).devices[GPU0] == 6 * GIB - one


def test_promised_room_is_taken() -> None:
    s = Scenario([gpu("3GiB")], {"a": M, "b": M, "small": SMALL}, auto=False)
    request = s.ask("a")
    s.finish_load("a")
    s.done(request)
    s.wait(9)
    s.ask("b")
    promised = s.replica("b").placement.device_bytes[0]
    assert s.core.rooms.without(BOX, []).devices[GPU0] == 3 * GIB - promised
    assert s.core.rooms.now(BOX).devices[GPU0] == 3 * GIB - 2 * promised  # nobody else may start yet
    assert s.core.rooms.to_start(s.replica("b")).devices[GPU0] == 3 * GIB - promised


def test_an_empty_machine_keeps_its_reserve_and_its_pinned_models() -> None:
    s = Scenario([gpu("3GiB")], {"a": M}, ram="16GiB", catalogue={"reserves": {"gpu_bytes": "1GiB"}})
    s.foreign[GPU0] = GIB
    s.read_devices()
    empty = s.core.rooms.empty(BOX)
    assert (empty.devices[GPU0], empty.host_bytes) == (2 * GIB, 14 * GIB)
    s.ask("a")
    replica = s.replica("a")
    kept = s.core.rooms.empty(BOX, [replica])
    assert kept.devices[GPU0] == 2 * GIB - replica.placement.device_bytes[0]
    assert kept.host_bytes == 14 * GIB - s.core.ledger.amount(replica.replica_id, host_account(BOX))


def test_replicas_of_other_machines_count_as_active_only() -> None:
    s = Scenario([gpu("3GiB")], {"a": M}, catalogue={"policy": {"max_active_models": 3}})
    s.add_node("attic", [gpu("1GiB", "gpu9")])
    s.run("a")
    room = s.core.rooms.now(NodeId("attic"))
    assert room.active == 2 and room.devices == {DeviceId("id-gpu9"): GIB}
    freed = s.core.rooms.without(NodeId("attic"), [s.replica("a").replica_id])
    assert freed.active == 3 and freed.devices == room.devices


def test_lost_and_unread_devices_have_no_room() -> None:
    s = Scenario([gpu("3GiB")], {"a": M})
    s.join("attic", [gpu("3GiB", "gpu9")])
    assert s.core.rooms.now(NodeId("attic")).devices == {}
    s.lost[GPU0] = "gone"
    s.read_devices()
    assert s.core.rooms.now(BOX).devices == {}


def test_host_ram_counts_mapped_pages_as_ours() -> None:
    s = Scenario([], {"a": M}, ram="16GiB")
    s.run("a")
    s.now += 5
    s.report_node()  # the kernel shows mapped pages as available
    assert s.core.rooms.now(BOX).host_bytes == 14 * GIB - s.replica("a").placement.host_bytes


def test_host_ram_that_a_replica_will_need_later_is_not_given_away() -> None:
    s = Scenario([], {"a": M}, ram="16GiB")
    s.host_foreign[BOX] = GIB
    s.report_node()
    s.run("a")
    s.now += 5
    s.report_node()
    placement = s.replica("a").placement
    later = placement.host_bytes - placement.host_mapped_bytes - placement.host_resting_bytes
    assert later > 0
    assert s.core.rooms.now(BOX).host_bytes == 13 * GIB - placement.host_bytes
    s.runners[s.replica("a").replica_id].anonymous_bytes += later
    s.report_node()
    assert s.core.rooms.now(BOX).host_bytes == 13 * GIB - placement.host_bytes
    s.host_foreign[BOX] = 2 * GIB
    s.report_node()
    assert s.core.rooms.now(BOX).host_bytes == 12 * GIB - placement.host_bytes
