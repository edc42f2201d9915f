"""Who makes room: eviction, promises, draining, turns between busy models, the limit on active models."""

from __future__ import annotations

import pytest
from scenario import LARGE, MEDIUM, SMALL, Scenario, gpu

from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.choice.placement import Chooser
from scheduler.dispatch import MOST_DECISIONS
from scheduler.errors import Unavailable
from scheduler.units import GIB, DeviceId, ReplicaId

M = (24, 2048, 5632)
TRIO = {"a": M, "b": M, "c": M}
PATIENT = {"policy": {"spill_after_s": 600}}


def two_gpus(**more: object) -> Scenario:
    return Scenario([gpu("3GiB"), gpu("3GiB", "gpu1")], {**TRIO, "d": M, "small": SMALL}, **more)  # type: ignore[arg-type]


def test_the_least_recently_used_goes() -> None:
    s = two_gpus()
    for model in ("a", "b", "a", "c"):
        s.run(model)
        s.wait(10)
    assert s.evicted() == ["b"] and s.loaded_models() == {"a", "c"}
    s.run("b")
    assert s.evicted() == ["b", "a"]


@pytest.mark.parametrize(("eviction", "victim"), [("lru", "a"), ("gdsf", "b")])
def test_what_is_asked_for_often_may_be_worth_more_than_what_was_used_last(eviction: str, victim: str) -> None:
    s = two_gpus(catalogue={"policy": {"eviction": eviction}})
    for model in ("a", "a", "a", "a", "b", "c"):
        s.run(model)
        s.wait(10)
    assert s.evicted() == [victim]


def test_popularity_fades() -> None:
    """A model that was asked for often goes before one that is asked for now."""
    s = two_gpus(catalogue={"policy": {"eviction": "gdsf"}})
    for _ in range(4):
        s.run("a")
    s.wait(3 * 600, longest_step_s=5)
    s.run("b")
    s.wait(10)
    s.run("c")
    assert s.evicted() == ["a"]


def test_what_was_used_long_ago_goes_although_it_takes_longer_to_load_again() -> None:
    s = Scenario([gpu("3200MiB")], {"a": M, "small": SMALL, "other": SMALL})
    s.run("a")
    s.wait(600, longest_step_s=5)
    s.run("small")
    s.wait(1)
    s.run("other")
    assert s.evicted() == ["a"]


@pytest.mark.parametrize(("priority", "victim"), [(0, "a"), (3, "b")])
def test_a_model_of_higher_priority_is_regretted_more(priority: int, victim: str) -> None:
    models = {"a": {"path": "a.gguf", "priority": priority}}
    s = two_gpus(catalogue={"models": models})
    for model in ("a", "b", "c"):
        s.run(model)
        s.wait(10)
    assert s.evicted() == [victim]


def test_nobody_is_evicted_while_there_is_room() -> None:
    s = two_gpus()
    for model in ("a", "b", "small"):
        s.run(model)
    assert s.evicted() == []


def test_the_smallest_set_is_evicted_even_if_it_is_younger() -> None:
    s = Scenario([gpu("3GiB"), gpu("3GiB", "gpu1")], {**TRIO, **{f"s{i}": SMALL for i in range(8)}})
    for i in range(8):
        s.run(f"s{i}")
    s.run("a")
    s.wait(60)
    assert s.where("s0") == ["gpu0"] and s.where("a") == ["gpu1"]
    s.run("b")
    assert s.evicted() == ["a"]


def test_only_where_room_is_needed() -> None:
    s = Scenario([gpu("3GiB"), gpu("500MiB", "gpu1")], {**TRIO, "small": SMALL})
    s.run("small")
    s.run("a")
    s.wait(60)
    s.run("b")
    assert s.evicted() == ["a"] and "small" in s.loaded_models()


def test_busy_pinned_and_loading_replicas_stay() -> None:
    s = Scenario([gpu("3GiB")], TRIO, catalogue=PATIENT)
    running = s.ask("a")
    s.wait(30)
    waiting = s.ask("b")
    assert s.waits(waiting) and s.why(waiting) == "waiting for a (busy)"
    s.done(running)
    assert waiting in s.grants
    s.done(waiting)
    s.send(ev.PinAsked("b", True))
    refused = s.ask("c", deadline_s=100)
    assert "b is pinned" in s.why(refused) or s.tier("c") != "one GPU"
    assert "b" in s.loaded_models()


def test_a_crowd_of_waiting_models_is_not_decided_about_at_every_event(monkeypatch: pytest.MonkeyPatch) -> None:
    s = Scenario([gpu("3GiB")], {f"m{i}": M for i in range(20)}, catalogue=PATIENT)
    first, *others = (s.ask(f"m{i}") for i in range(20))
    decided: list[str] = []
    most = 0
    choose, handle = Chooser.choose, s.core.handle
    monkeypatch.setattr(
        Chooser, "choose", lambda self, **more: decided.append(self.workload.model) or choose(self, **more)
    )

    def counted(event: ev.Event, now: float) -> list[cmd.Command]:
        nonlocal most
        before = len(decided)
        commands = handle(event, now)
        most = max(most, len(decided) - before)
        return commands

    monkeypatch.setattr(s.core, "handle", counted)
    s.done(first)
    assert others[0] in s.grants and decided[0] == "m1" and most == MOST_DECISIONS
    decided.clear()
    s.wait(1.1)
    assert set(decided) == {f"m{i}" for i in range(2, 20)}  # everybody's turn comes within a second


def test_a_pinned_model_that_leaves_no_room_is_named_in_the_refusal() -> None:
    s = Scenario([gpu("3GiB")], {"a": M, "large": LARGE}, ram="14GiB")
    s.run("a")
    s.send(ev.PinAsked("a", True))
    s.wait(60)
    request = s.ask("large")
    assert isinstance(s.error(request), Unavailable) and "a is pinned" in s.why(request)
    s.send(ev.PinAsked("a", False))
    assert s.ask("large") in s.grants


def test_a_fresh_model_is_spared_when_an_older_one_will_do() -> None:
    s = two_gpus()
    s.run("a")
    s.wait(10)
    s.run("b")
    s.run("a")  # a is the most recently used, but b has only just been loaded
    s.run("c")
    assert s.evicted() == ["a"]


def test_a_fresh_model_goes_when_nothing_else_is_left() -> None:
    s = Scenario([gpu("3GiB")], TRIO)
    s.run("a")
    s.run("b")
    assert s.evicted() == ["a"]


def test_a_model_with_requests_is_not_idle() -> None:
    s = Scenario([gpu("3GiB")], TRIO, catalogue=PATIENT)
    first = s.ask("a")
    other = s.ask("b")
    second = s.ask("a")
    s.done(first)
    assert second in s.grants and s.waits(other) and s.evicted() == []


def test_one_gpu_after_eviction_comes_before_two_free_ones() -> None:
    s = Scenario([gpu("3GiB"), gpu("2GiB", "gpu1"), gpu("2GiB", "gpu2")], TRIO)
    s.run("a")
    s.wait(60)
    s.run("b")
    assert s.evicted() == ["a"] and s.tier("b") == "one GPU"


def test_a_replica_starts_only_when_its_room_is_back() -> None:
    s = Scenario([gpu("3GiB")], TRIO, auto=False)
    first = s.ask("a")
    s.finish_load("a")
    s.done(first)
    s.wait(10)
    s.ask("b")
    assert s.states("a") == ["stopping"] and s.states("b") == ["pending"] and len(s.started) == 1
    s.wait(60)
    assert s.states("b") == ["pending"] and not s.announced("room_lost")
    s.finish_stops()
    assert s.states("b") == ["loading"]


def test_the_device_must_show_the_memory_back() -> None:
    s = Scenario([gpu("3GiB")], TRIO, auto=False)
    first = s.ask("a")
    s.finish_load("a")
    s.done(first)
    s.wait(10)
    request = s.ask("b")
    gone = s.replica("a").replica_id
    del s.runners[gone]
    s.foreign[DeviceId("id-gpu0")] = 2 * GIB  # somebody else was quicker
    s.gone(gone)
    assert s.states("b") == ["pending"]
    s.wait(30)
    assert s.announced("room_lost") and s.waits(request)


def test_a_promise_does_not_wait_for_the_room_of_others() -> None:
    s = two_gpus(auto=False)
    for model in ("a", "b"):
        request = s.ask(model)
        s.finish_load(model)
        s.done(request)
    s.wait(10)
    s.ask("c")
    s.ask("d")
    assert s.states("c") == s.states("d") == ["pending"]
    s.gone(s.replica("a").replica_id)
    assert sorted(s.states("c") + s.states("d")) == ["loading", "pending"]


def test_two_promises_on_one_device_each_start_with_their_own_room() -> None:
    s = Scenario([gpu("6GiB")], {**TRIO, "d": M}, auto=False)
    for model in ("a", "b"):
        request = s.ask(model)
        s.finish_load(model)
        s.done(request)
    s.wait(10)
    s.ask("c")
    s.ask("d")
    s.gone(s.replica("a").replica_id)
    assert sorted(s.states("c") + s.states("d")) == ["loading", "pending"]


def test_room_that_is_coming_back_is_not_made_twice() -> None:
    s = two_gpus(auto=False)
    for model in ("a", "b"):
        request = s.ask(model)
        s.finish_load(model)
        s.done(request)
    s.wait(10)
    s.unload("a")
    s.ask("c")
    assert s.evicted() == [] and s.states("c") == ["pending"]


def test_a_busy_victim_finishes_and_takes_nothing_new() -> None:
    s = Scenario([gpu("3GiB")], TRIO, catalogue=PATIENT)
    first = s.ask("a")
    s.wait(30)
    other = s.ask("b")
    s.wait(3)
    second = s.ask("a")
    s.done(first)
    assert other in s.grants and s.waits(second) and s.announced("replica_draining")


def test_a_model_that_makes_room_is_not_loaded_again_beside_itself() -> None:
    """Not even where there is room in host RAM: it would stay in the poorer place."""
    s = Scenario([gpu("3GiB")], TRIO, ram="64GiB", catalogue=PATIENT)
    first = s.ask("a")
    s.wait(30)
    other = s.ask("b")
    s.wait(3)
    assert s.announced("replica_draining")
    second = s.ask("a")
    s.wait(5)
    assert s.states("a") == ["ready"] and "is loaded again after that" in s.why(second)
    s.done(first)
    assert other in s.grants
    s.wait(30)
    s.done(other)
    s.wait(2)
    assert second in s.grants and s.where("a") == ["gpu0"]


def test_a_replica_with_too_short_a_context_makes_room_for_a_longer_one_of_its_model() -> None:
    """Drained for its own model, it must not keep that model waiting."""
    s = Scenario([gpu("8GiB")], {"large": (16, 4096, 11008)}, ram="6GiB", catalogue=PATIENT)
    first = s.ask("large", n_ctx=8192)
    s.wait(30)
    longer = s.ask("large", n_ctx=16384)
    s.wait(10)
    s.done(first)
    small = s.ask("large", n_ctx=1024)
    s.wait(10)
    assert longer in s.grants, s.why(longer)
    s.done(longer)
    s.wait(2)
    assert small in s.grants


@pytest.mark.slow
def test_two_busy_models_take_turns() -> None:
    s = Scenario([gpu("3GiB")], TRIO, catalogue=PATIENT)
    served = {"a": 0, "b": 0}
    requests = {model: [s.ask(model) for _ in range(3)] for model in served}
    for _ in range(200):
        s.wait(1.0)
        for model, pending in requests.items():
            if pending[0] in s.grants:
                s.done(pending.pop(0))
                served[model] += 1
                pending.append(s.ask(model))
    assert min(served.values()) > 60
    assert 10 < len(s.evicted()) < 45  # they do not swap for every request


def test_a_big_model_is_not_starved_by_small_ones() -> None:
    s = Scenario(
        [gpu("3GiB")], {"big": M, **{f"s{i}": SMALL for i in range(7)}}, catalogue={"policy": {"spill_after_s": 1e6}}
    )
    running = {f"s{i}": s.ask(f"s{i}") for i in range(7)}
    s.wait(10)
    big = s.ask("big")
    for second in range(120):
        s.wait(1.0)
        model = f"s{second % 7}"
        if running[model] in s.grants:
            s.done(running[model])
            running[model] = s.ask(model)
        if big in s.grants:
            break
    assert big in s.grants


def test_a_drained_replica_is_kept_for_whom_it_was_drained() -> None:
    s = two_gpus(catalogue=PATIENT)
    first, second = s.ask("a"), s.ask("b")
    s.wait(30)
    third = s.ask("c")
    s.wait(3)
    drained = s.announced("replica_draining")[0].model
    fourth = s.ask("d")
    s.done(first if drained == "a" else second)
    assert third in s.grants and s.waits(fourth)


def test_draining_ends_when_nobody_needs_the_room_any_more() -> None:
    s = Scenario([gpu("3GiB")], TRIO, catalogue=PATIENT)
    first = s.ask("a")
    s.wait(30)
    other = s.ask("b")
    s.wait(3)
    second = s.ask("a")
    s.cancel(other)
    s.done(first)
    assert second in s.grants and s.evicted() == []


def test_draining_ends_when_room_was_found_elsewhere() -> None:
    s = two_gpus(catalogue=PATIENT)
    first, second = s.ask("a"), s.ask("b")
    s.wait(30)
    other = s.ask("c")
    s.wait(3)
    drained = s.announced("replica_draining")[0].model
    s.done(second if drained == "a" else first)
    assert other in s.grants
    assert all(not replica.drain_for for replica in s.core.replicas.values())


def test_a_request_waits_for_gpus_before_it_settles_for_host_ram() -> None:
    s = Scenario([gpu("3GiB")], TRIO)
    s.ask("a")
    s.wait(1)
    other = s.ask("b")
    assert s.waits(other)
    s.wait(31)
    assert other in s.grants and s.tier("b") in ("some layers in host RAM", "CPU only")


def test_a_partial_offload_evicts_for_clearly_more_layers() -> None:
    s = Scenario([gpu("8GiB")], {"large": LARGE, "small": SMALL, **TRIO})
    s.run("a")
    s.run("b")
    s.wait(60)
    s.run("large")
    assert set(s.evicted()) == {"a", "b"}


def test_a_partial_offload_evicts_nobody_for_little() -> None:
    s = Scenario([gpu("8GiB")], {"large": LARGE, "small": SMALL})
    s.run("small")
    s.wait(60)
    s.run("large")
    assert s.evicted() == [] and s.tier("large") == "some layers in host RAM"


def test_at_most_one_active_model() -> None:
    s = Scenario([gpu("24GiB")], TRIO, catalogue={"policy": {"max_active_models": 1}})
    for model in ("a", "b", "c"):
        s.run(model)
        assert s.loaded_models() == {model}
    assert s.evicted() == ["a", "b"]


def test_at_most_one_active_model_over_all_machines() -> None:
    s = Scenario([gpu("3GiB")], {"a": M}, catalogue={"policy": {"max_active_models": 1}}, auto=False)
    s.models = dict(TRIO)
    s.add_node("attic", [gpu("3GiB", "gpu9")], has=["b"])
    request = s.ask("a")
    s.finish_load("a")
    s.done(request)
    s.wait(10)
    s.ask("b")
    assert s.states("a") == ["stopping"] and s.states("b") == ["pending"]
    s.finish_stops()
    assert s.states("b") == ["loading"]


def test_a_model_that_is_stopping_is_as_good_as_gone_for_the_plans() -> None:
    s = Scenario([], {"a": SMALL, "b": SMALL}, cores=1, catalogue={"policy": {"max_active_models": 1}}, auto=False)
    request = s.ask("a")
    s.finish_load("a")
    s.done(request)
    s.unload("a")
    s.ask("b")
    assert s.states("a") == ["stopping"] and s.states("b") == ["pending"]


def test_at_most_two_active_models() -> None:
    s = Scenario([gpu("24GiB")], TRIO, catalogue={"policy": {"max_active_models": 2}})
    for model in ("a", "b", "c"):
        s.run(model)
        s.wait(10)
    assert s.evicted() == ["a"]


def test_an_active_model_that_is_busy_is_waited_for() -> None:
    s = Scenario([gpu("24GiB")], TRIO, catalogue={"policy": {"max_active_models": 1, "spill_after_s": 0}})
    first = s.ask("a")
    other = s.ask("b")
    assert s.waits(other)
    s.done(first)
    assert other in s.grants


def test_memory_that_others_free_is_waited_for_a_while() -> None:
    s = Scenario([gpu("3GiB")], TRIO, ram="4GiB")
    s.foreign[DeviceId("id-gpu0")] = 2 * GIB
    s.read_devices()
    gone, refused = s.ask("a"), s.ask("b")
    s.wait(10)
    assert s.waits(gone)
    s.cancel(gone)
    s.wait(15)
    assert isinstance(s.error(refused), Unavailable) and "other programs use 2.0 GiB" in s.why(refused)
    again = s.ask("a")
    s.foreign.clear()
    s.read_devices()
    assert again in s.grants


def test_a_victim_that_dies_makes_room_all_the_same() -> None:
    s = Scenario([gpu("3GiB")], TRIO, catalogue=PATIENT)
    s.ask("a")
    s.wait(30)
    other = s.ask("b")
    s.kill("a")
    assert other in s.grants


def test_a_process_that_is_gone_by_itself() -> None:
    s = Scenario([gpu("3GiB")], TRIO)
    request = s.ask("a")
    s.auto = False
    s.gone(s.replica("a").replica_id)
    assert not s.core.replicas and s.announced("replica_died")
    s.done(request)
    s.send(ev.ReplicaGone(ReplicaId("nobody")))


def test_a_foreign_process_is_told_from_a_load_under_way() -> None:
    """A half-loaded replica is not mistaken for somebody else's memory: the rest of the device stays usable."""
    s = Scenario([gpu("6GiB")], TRIO, auto=False)
    s.ask("a")
    s.allocate(s.started[0], share=0.8)
    s.read_devices()
    s.ask("b")
    assert s.where("b") == ["gpu0"] and s.states("b") == ["loading"]


def test_a_reading_from_the_middle_of_a_load_that_comes_late() -> None:
    s = Scenario([gpu("6GiB")], TRIO, auto=False)
    s.foreign[DeviceId("id-gpu0")] = GIB
    s.read_devices()
    s.ask("a")
    s.finish_load("a")
    real, s.runners = s.runners, {}
    s.read_devices()  # shows nothing of it yet
    s.runners = real
    assert s.core.inventory.device(DeviceId("id-gpu0")).foreign_bytes == GIB  # type: ignore[union-attr]


def test_readings_that_name_processes_are_exact() -> None:
    s = Scenario([gpu("6GiB")], TRIO, auto=False, tells_processes=True)
    s.ask("a")
    s.allocate(s.started[0], share=0.5)
    s.foreign[DeviceId("id-gpu0")] = GIB
    s.read_devices()
    assert s.core.inventory.device(DeviceId("id-gpu0")).foreign_bytes == GIB  # type: ignore[union-attr]


def test_medium_is_what_these_tests_think() -> None:
    assert MEDIUM == M


def test_two_that_are_in_each_other_s_way_do_not_wait_for_ever() -> None:
    """Each wants a longer context, for which it needs the GPU that the other one is busy on."""
    sizes = ["3GiB", "3GiB"]
    s = Scenario([gpu(size, f"gpu{i}") for i, size in enumerate(sizes)], {"a": M, "b": M})
    held = [s.ask("a"), s.ask("b")]
    s.wait(70)
    longer = [s.ask("a", n_ctx=16384), s.ask("b", n_ctx=16384)]
    s.wait(5)
    for request in held:
        s.done(request)  # in vain where the lease has gone with its replica
    s.wait(30)
    assert any(request in s.grants for request in longer) or all(request in s.refusals for request in longer)
    assert all(not replica.drain_for or replica.busy for replica in s.core.replicas.values())


def test_a_replica_takes_requests_again_when_what_it_was_drained_for_is_served_otherwise() -> None:
    s = Scenario([gpu("3GiB"), gpu("3GiB", "gpu1")], {"a": M, "b": M}, catalogue={"policy": {"lease_ttl_s": 1000}})
    s.run("a")
    s.run("b")
    busy = [s.ask("a"), s.ask("b")]
    s.wait(70)
    longer = s.ask("b", n_ctx=16384)
    s.wait(5)
    s.cancel(longer)
    waits = s.ask("b")
    s.wait(5)
    assert all(not replica.drain_for for replica in s.core.replicas.values())
    s.done(busy[0])
    assert s.ask("a") in s.grants and s.waits(waits)
