"""Machines and GPUs that join, leave, fall silent and come back; runners that outlive a restart; files that change."""

from __future__ import annotations

from dataclasses import replace

from scenario import LARGE, SMALL, Scenario, gpu

from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.cluster.facts import DeviceReading, NodeReading
from scheduler.cluster.replica import ReplicaState
from scheduler.core import SchedulerCore
from scheduler.errors import Unavailable, UnknownModel
from scheduler.units import GIB, DeviceId, NodeId, ReplicaId

M = (24, 2048, 5632)
GPU0 = DeviceId("id-gpu0")


def test_requests_wait_for_the_first_machine() -> None:
    s = Scenario([gpu("3GiB")], {"a": M}, catalogue={"models": {"a": {"path": "a.gguf"}}})
    s.lose_node("box")
    request = s.ask("a")
    assert s.why(request) == "no machine has joined yet"
    s.add_node("box", s.gpus)
    assert request in s.grants


def test_nothing_is_decided_before_every_gpu_has_been_read() -> None:
    s = Scenario([], {"a": M}, ram="3GiB")
    s.join("attic", [gpu("3GiB"), gpu("8GiB", "gpu1")])
    s.report_node("attic")
    request = s.ask("a")
    assert s.why(request) == "reading its header and the machines"
    s.read_devices()
    assert s.where("a") == ["gpu0"] and request in s.grants


def test_a_gpu_that_never_reports_does_not_hold_up_its_machine_for_ever() -> None:
    s = Scenario([], {"a": M}, ram="3GiB")
    s.join("attic", [gpu("3GiB"), gpu("8GiB", "gpu1")])
    s.report_node("attic")
    request = s.ask("a")
    for _ in range(40):
        s.now += 1
        s.read_device(s.core.inventory.nodes[NodeId("attic")].facts.devices[0])
        s.read_hosts()
        s.send(ev.Ticked())
    assert request in s.grants and s.where("a") == ["gpu0"]


def test_a_machine_that_joins_is_used_by_who_waits() -> None:
    s = Scenario([gpu("3GiB")], {"a": M, "b": M}, ram="4GiB")
    s.ask("a")
    waiting = s.ask("b")
    assert s.waits(waiting)
    s.add_node("attic", [gpu("3GiB", "gpu9")])
    assert waiting in s.grants and s.node("b") == "attic"


def test_a_machine_joins_once() -> None:
    s = Scenario([gpu("3GiB")], {"a": M})
    s.run("a")
    s.send(ev.NodeJoined(s.core.inventory.nodes[NodeId("box")].facts))
    assert s.loaded_models() == {"a"} and len(s.announced("node_joined")) == 1


def test_a_lost_machine_takes_its_replicas_along_and_requests_are_planned_again() -> None:
    s = Scenario([gpu("3GiB")], {"a": M})
    s.add_node("attic", [gpu("4GiB", "gpu9")])
    request = s.ask("a")
    waiting = s.ask("a")
    assert s.node("a") == "box"
    s.lose_node("box")
    assert waiting in s.grants and s.node("a") == "attic"
    s.done(request, failed=True)
    s.lose_node("box")
    assert len(s.announced("node_lost")) == 1


def test_a_lost_machine_with_pending_and_stopping_replicas() -> None:
    s = Scenario([gpu("3GiB")], {"a": M, "b": M}, auto=False)
    first = s.ask("a")
    s.finish_load("a")
    s.done(first)
    s.wait(10)
    s.ask("b")
    assert s.states("a") + s.states("b") == ["stopping", "pending"]
    s.lose_node("box")
    assert not s.core.replicas and not s.core.ledger.accounts()[1:]
    for command in s.stopped:
        s.send(ev.ReplicaGone(command.replica_id))


def test_a_model_that_only_a_lost_machine_had_is_unknown() -> None:
    s = Scenario([gpu("3GiB")], {"a": M}, auto=False)
    waiting = s.ask("a")
    s.lose_node("box")
    assert isinstance(s.error(waiting), UnknownModel)


def test_readings_of_unknown_machines_are_ignored() -> None:
    s = Scenario([gpu("3GiB")], {"a": M})
    s.send(ev.DeviceSampled(DeviceReading(DeviceId("who"), 1, 1, 0, 0.0)))
    s.send(ev.NodeSampled(NodeReading(NodeId("who"), 1, 0.0)))
    s.send(ev.ShapeRead(NodeId("who"), "/models/a.gguf", None, "broken"))
    assert s.ask("a") in s.grants


def test_a_reading_that_was_overtaken_is_ignored() -> None:
    s = Scenario([gpu("3GiB")], {"a": M})
    s.send(ev.DeviceSampled(DeviceReading(GPU0, 3 * GIB, GIB, 2 * GIB, s.now - 1)))
    s.send(ev.NodeSampled(NodeReading(NodeId("box"), 0, s.now - 1)))
    assert s.core.rooms.now(NodeId("box")).devices[GPU0] == 3 * GIB and "a" in s.core.models.by_name


def test_a_clock_that_was_set_back_is_believed() -> None:
    s = Scenario([gpu("3GiB")], {"a": M})
    s.send(ev.DeviceSampled(DeviceReading(GPU0, 3 * GIB, GIB, 2 * GIB, s.now - 3600)))
    assert s.core.rooms.now(NodeId("box")).devices[GPU0] == GIB


def test_a_gpu_that_is_lost_takes_its_replicas_along() -> None:
    s = Scenario([gpu("3GiB"), gpu("6GiB", "gpu1")], {"a": M})
    s.ask("a")
    waiting = s.ask("a")
    s.lost[GPU0] = "fell off the bus"
    s.read_devices()
    s.read_devices()
    assert waiting in s.grants and s.where("a") == ["gpu1"]
    assert [n.message for n in s.announced("gpu_lost")] == ["gpu0 cannot be used: fell off the bus"]


def test_a_gpu_that_is_lost_while_room_is_being_made() -> None:
    s = Scenario([gpu("3GiB")], {"a": M, "b": M}, auto=False)
    first = s.ask("a")
    s.finish_load("a")
    s.done(first)
    s.wait(10)
    waiting = s.ask("b")
    s.lost[GPU0] = "fell off the bus"
    s.read_devices()
    s.finish_stops()
    assert s.waits(waiting) and s.tier("b") == "CPU only"


def test_a_lost_gpu_is_no_reason_to_call_a_request_impossible_and_it_may_come_back() -> None:
    s = Scenario([gpu("3GiB")], {"a": M}, ram="3GiB")
    s.lost[GPU0] = "fell off the bus"
    s.read_devices()
    refused = s.ask("a")
    s.wait(25)
    assert isinstance(s.error(refused), Unavailable) and "gpu0 cannot be used: it is lost: fell off the bus" in s.why(
        refused
    )
    waiting = s.ask("a")
    s.lost.clear()
    s.read_devices()
    assert waiting in s.grants


def test_a_silent_gpu_gets_nothing_new_until_it_reports_again() -> None:
    s = Scenario([gpu("3500MiB"), gpu("6GiB", "gpu1")], {"a": M, "b": SMALL, "c": SMALL})
    s.run("a")
    for _ in range(31):
        s.now += 1
        s.read_device(s.core.inventory.nodes[NodeId("box")].facts.devices[1])
        s.read_hosts()
        s.send(ev.Ticked())
    assert len(s.announced("gpu_silent")) == 1 and s.loaded_models() == {"a"}
    s.auto = False
    s.ask("b")
    assert s.where("b") == ["gpu1"]
    s.read_devices()
    s.ask("c")
    assert s.where("c") == ["gpu0"]


def test_a_runner_that_outlived_a_restart_goes_on_serving() -> None:
    before = Scenario([gpu("3GiB")], {"a": M})
    before.run("a")
    old = before.replica("a")
    ready = ev.ReplicaReady(old.replica_id, old.pid, old.measured, old.n_ctx, 1.0)
    adopted = ev.ReplicaAdopted(old.replica_id, "a", old.path, old.placement, ready)

    s = Scenario([gpu("3GiB")], {"a": M})
    s.runners = before.runners
    s.read_devices()  # at first its memory is a stranger's
    s.send(adopted)
    s.send(adopted)
    assert s.ask("a") in s.grants and not s.started
    assert s.core.inventory.device(GPU0).foreign_bytes == 0  # type: ignore[union-attr]
    for account in s.core.ledger.accounts():
        assert s.core.ledger.booked(account, "held") == before.core.ledger.booked(account, "held")


def test_a_runner_for_which_there_is_no_room_is_ended() -> None:
    before = Scenario([gpu("3GiB")], {"a": M})
    before.run("a")
    old = before.replica("a")
    ready = ev.ReplicaReady(old.replica_id, old.pid, old.measured, old.n_ctx, 1.0)
    s = Scenario([gpu("3GiB")], {"a": M})
    s.run("a")
    s.send(ev.ReplicaAdopted(ReplicaId("older"), "a", old.path, old.placement, ready))
    elsewhere = replace(old.placement, node_id=NodeId("nowhere"))
    s.send(ev.ReplicaAdopted(ReplicaId("lost"), "a", old.path, elsewhere, ready))
    assert [c.replica_id for c in s.stopped] == ["older", "lost"] and len(s.core.replicas) == 1


def test_replica_ids_differ_over_restarts() -> None:
    ids = set()
    for tag in ("x", "y"):
        s = Scenario([gpu("3GiB")], {"a": M})
        s.core = SchedulerCore(s.core.catalogue, tag)
        s.add_node("box", s.gpus)
        ids.add(s.grants[s.ask("a")].replica_id)
    assert len(ids) == 2


def test_a_file_that_changes_is_read_again_and_its_idle_replica_stopped() -> None:
    s = Scenario([gpu("3GiB")], {"a": M})
    s.run("a")
    s.models["a"] = SMALL
    s.file_age["a"] = 2.0
    s.report_node()
    assert not s.core.replicas
    s.run("a")
    assert s.replica("a").placement.n_layers == 9


def test_a_busy_replica_of_a_changed_file_finishes_first() -> None:
    s = Scenario([gpu("6GiB")], {"a": M})
    first = s.ask("a")
    s.file_age["a"] = 2.0
    s.report_node()
    second = s.ask("a")
    assert second in s.grants and s.grants[second].replica_id != s.grants[first].replica_id
    s.done(first)
    assert s.states("a") == ["ready"]


def test_a_header_that_could_not_be_read_is_tried_again() -> None:
    s = Scenario([gpu("3GiB")], {})
    s.models, s.reads_headers = {"a": M}, False
    s.report_node()
    request = s.ask("a")
    reads = [c for c in s.log if isinstance(c, cmd.ReadShape)]
    s.report_node()
    assert len([c for c in s.log if isinstance(c, cmd.ReadShape)]) == len(reads)  # it is under way
    s.send(ev.ShapeRead(NodeId("box"), "/models/a.gguf", None, trouble="stale file handle"))
    s.wait(1)
    assert "trying again: stale file handle" in s.why(request)
    s.reads_headers = True
    s.now += 1
    s.report_node()
    assert request in s.grants


def test_one_file_on_several_machines_is_one_model() -> None:
    s = Scenario([gpu("3GiB")], {"a": M, "b": M})
    s.add_node("attic", [gpu("3GiB", "gpu9")])
    s.run("a")
    s.run("b")
    assert {s.node("a"), s.node("b")} == {"box", "attic"} and len(s.core.models.by_name) == 2


def test_a_file_that_goes_away_takes_its_name_along() -> None:
    s = Scenario([gpu("3GiB")], {"a": M, "b": M})
    s.models = {"b": M}
    s.now += 1
    s.report_node()
    assert isinstance(s.error(s.ask("a")), UnknownModel)


def test_replicas_of_large_models_on_a_lost_gpu_are_all_stopped() -> None:
    s = Scenario([gpu("8GiB"), gpu("6GiB", "gpu1")], {"large": LARGE}, auto=False)
    s.ask("large")
    s.finish_load("large")
    s.lost[DeviceId("id-gpu1")] = "Xid 79"
    s.read_devices()
    assert s.replica("large").state is ReplicaState.STOPPING


def test_a_silent_machine_gets_nothing_new_until_it_reports_again() -> None:
    s = Scenario([gpu("6GiB")], {"a": M, "b": SMALL, "c": SMALL, "large": M})
    s.run("a")
    for _ in range(11):
        s.now += 1
        s.read_devices()  # its cards' actors go on
        s.send(ev.Ticked())
    assert len(s.announced("node_silent")) == 1
    serving = s.ask("a")
    assert serving in s.grants, "what is loaded there goes on"
    s.done(serving)
    small, large = s.ask("b"), s.ask("large")
    assert s.waits(small) and s.waits(large) and s.loaded_models() == {"a"}, "nothing is evicted for nothing"
    s.report_node()
    assert small in s.grants
    s.done(small)
    for _ in range(31):
        s.now += 1
        s.read_devices()
        s.send(ev.Ticked())
    refused = s.ask("c")
    for _ in range(25):
        s.now += 1
        s.send(ev.Ticked())
    assert isinstance(s.error(refused), Unavailable), "not now, which is not never"
    assert "box cannot be used: it has not reported for 10 s" in s.why(refused)
