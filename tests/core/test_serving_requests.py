"""Requests: slots, order, contexts, kinds, cancellation, deadlines."""

from __future__ import annotations

from scenario import MEDIUM, SMALL, Scenario, gpu

from scheduler.errors import DeadlineExceeded, QueueFull, Rejected, Unavailable, UnknownModel

ONE = {"small": SMALL}


def test_a_request_is_placed_loaded_and_granted() -> None:
    s = Scenario([gpu("2GiB")], ONE)
    request = s.ask("small")
    assert s.grants[request].n_ctx == 8192 and s.tier("small") == "one GPU"


def test_a_loaded_model_is_not_loaded_again() -> None:
    s = Scenario([gpu("2GiB")], ONE)
    s.run("small")
    s.run("small")
    assert len(s.started) == 1


def test_first_come_first_served_per_model() -> None:
    s = Scenario([gpu("2GiB")], ONE)
    first, second, third = (s.ask("small") for _ in range(3))
    assert s.waits(second) and s.why(second) == "all slots are taken"
    s.done(first)
    assert second in s.grants and third not in s.grants
    s.done(second)
    assert third in s.grants


def test_as_many_requests_at_once_as_slots() -> None:
    s = Scenario([gpu("2GiB")], ONE, catalogue={"defaults": {"n_seq_max": 3}})
    requests = [s.ask("small") for _ in range(4)]
    assert [r in s.grants for r in requests] == [True, True, True, False]


def test_models_that_do_not_compete_do_not_wait_for_each_other() -> None:
    s = Scenario([gpu("400MiB"), gpu("3GiB", "gpu1")], {"small": SMALL, "medium": MEDIUM}, auto=False)
    s.ask("medium")
    s.ask("small")
    s.finish_load("small")
    assert "small" in s.loaded_models() and s.states("medium") == ["loading"]


def test_a_smaller_context_is_served_by_a_larger_replica() -> None:
    s = Scenario([gpu("2GiB")], ONE)
    s.run("small", n_ctx=8192)
    s.run("small", n_ctx=1024)
    assert len(s.started) == 1


def test_a_larger_context_replaces_an_idle_smaller_replica() -> None:
    s = Scenario([gpu("400MiB")], ONE)
    s.run("small", n_ctx=1024)
    request = s.ask("small", n_ctx=8192)
    assert s.grants[request].n_ctx == 8192
    assert s.evicted() == ["small"] and s.states("small") == ["ready"]


def test_requests_for_more_and_more_context_load_a_model_a_few_times() -> None:
    s = Scenario([gpu("2GiB")], ONE, catalogue={"defaults": {"n_ctx": 1024}})
    granted = [s.grants[s.run("small", n_ctx=n_ctx)].n_ctx for n_ctx in range(1000, 9000, 250)]
    assert granted == sorted(granted) and set(granted) == {1024, 2048, 4096, 8192, 16384}
    assert len(s.started) == 5


def test_a_context_is_not_rounded_up_where_there_is_no_room_for_more() -> None:
    s = Scenario([gpu("400MiB")], ONE, catalogue={"defaults": {"n_ctx": 1024, "spill": False}})
    most = next(n for n in range(32768, 0, -256) if s.core.plan("small", n, s.now).choice.verdict == "free")
    assert most & (most - 1)  # else this machine shows nothing
    assert s.grants[s.run("small", n_ctx=most - 256)].n_ctx in (most - 256, most)


def test_a_larger_context_is_loaded_beside_a_busy_smaller_replica() -> None:
    s = Scenario([gpu("2GiB")], ONE)
    small = s.ask("small", n_ctx=1024)
    large = s.ask("small", n_ctx=8192)
    assert small in s.grants and large in s.grants
    assert s.grants[small].replica_id != s.grants[large].replica_id


def test_no_context_means_the_model_s_own_not_whatever_is_loaded() -> None:
    s = Scenario([gpu("2GiB")], ONE)
    s.run("small", n_ctx=1024)
    assert s.grants[s.run("small")].n_ctx == 8192
    assert s.grants[s.run("small", n_ctx=1024)].n_ctx == 8192


def test_the_catalogue_s_context_is_the_least_that_is_loaded() -> None:
    s = Scenario([gpu("2GiB")], ONE, catalogue={"defaults": {"n_ctx": 4096}})
    assert s.grants[s.run("small", n_ctx=300)].n_ctx == 4096


def test_a_context_is_counted_per_slot() -> None:
    s = Scenario([gpu("2GiB")], ONE, catalogue={"defaults": {"n_seq_max": 2}})
    request = s.ask("small", n_ctx=4096)
    assert s.grants[request].n_ctx == 4096
    assert s.replica("small").placement.context.n_ctx == 8192


def test_a_unified_cache_gives_every_slot_the_whole_context() -> None:
    s = Scenario([gpu("2GiB")], ONE, catalogue={"defaults": {"n_seq_max": 2, "n_ctx": 4096, "kv_unified": True}})
    assert s.grants[s.ask("small")].n_ctx == 4096


def test_a_context_beyond_training_is_the_caller_s_mistake_and_nobody_else_s() -> None:
    s = Scenario([gpu("2GiB")], ONE)
    good, bad = s.ask("small"), s.ask("small", n_ctx=65536)
    assert isinstance(s.error(bad), Rejected) and "32768" in s.why(bad)
    assert good in s.grants


def test_the_wrong_kind_is_refused_alone() -> None:
    s = Scenario([gpu("2GiB")], ONE)
    running = s.ask("small")
    embed = s.ask("small", kind="embed")
    assert isinstance(s.error(embed), Rejected) and "embeddings: true" in s.why(embed)
    s.done(running)
    assert s.ask("small") in s.grants


def test_the_wrong_kind_is_refused_alone_even_when_it_came_before_the_header() -> None:
    s = Scenario([gpu("2GiB")], {})
    s.reads_headers = False
    s.models = dict(ONE)
    s.report_node()
    embed, generate = s.ask("small", kind="embed"), s.ask("small")
    assert s.why(embed) == "reading its header and the machines"
    for command in [c for c in s.log if type(c).__name__ == "ReadShape"]:
        s.read_header(command)
    assert isinstance(s.error(embed), Rejected) and generate in s.grants


def test_an_embedding_model_by_catalogue_serves_both_kinds() -> None:
    s = Scenario([gpu("2GiB")], ONE, catalogue={"models": {"small": {"path": "small.gguf", "embeddings": True}}})
    request = s.ask("small", kind="embed")
    s.done(request)
    assert s.ask("small") in s.grants


def test_an_unknown_model_gets_a_suggestion() -> None:
    s = Scenario([gpu("2GiB")], ONE)
    request = s.ask("smal")
    assert isinstance(s.error(request), UnknownModel) and "did you mean 'small'?" in s.why(request)
    assert "`arriero models`" in s.why(s.ask("qwertyuiop"))


def test_the_queue_is_bounded() -> None:
    s = Scenario([gpu("2GiB")], ONE, catalogue={"policy": {"queue_limit": 2}})
    requests = [s.ask("small") for _ in range(4)]
    assert isinstance(s.error(requests[3]), QueueFull) and s.error(requests[3]).retry_after_s > 0
    assert s.waits(requests[1]) and s.waits(requests[2])


def test_one_id_cannot_wait_twice() -> None:
    s = Scenario([gpu("2GiB")], ONE, auto=False)
    request = s.ask("small")
    s.serial -= 1
    s.ask("small")
    assert isinstance(s.error(request), Rejected) and len(s.core.queue) == 1


def test_a_deadline_ends_the_wait_with_the_reason() -> None:
    s = Scenario([gpu("2GiB")], ONE)
    s.ask("small")
    late = s.ask("small", deadline_s=3.0)
    s.wait(2.5)
    assert s.waits(late)
    s.wait(1.0)
    assert isinstance(s.error(late), DeadlineExceeded) and "all slots are taken" in s.why(late)


def test_a_queued_request_can_be_cancelled() -> None:
    s = Scenario([gpu("2GiB")], ONE)
    first, second, third = (s.ask("small") for _ in range(3))
    s.cancel(second)
    s.done(first)
    assert second not in s.grants and third in s.grants


def test_cancelling_a_granted_request_frees_its_slot() -> None:
    s = Scenario([gpu("2GiB")], ONE)
    first, second = s.ask("small"), s.ask("small")
    s.cancel(first)
    assert second in s.grants
    s.cancel("nobody")


def test_a_load_goes_on_when_its_only_client_leaves() -> None:
    s = Scenario([gpu("2GiB")], ONE, auto=False)
    s.cancel(s.ask("small"))
    s.finish_load("small")
    assert s.loaded_models() == {"small"}


def test_a_promise_is_withdrawn_when_nobody_waits_for_it() -> None:
    s = Scenario([gpu("3GiB")], {"medium": MEDIUM, "other": (24, 2048, 5632)}, auto=False)
    first = s.ask("medium")
    s.finish_load("medium")
    s.done(first)
    s.wait(6)
    second = s.ask("other")
    assert s.states("other") == ["pending"]
    s.cancel(second)
    assert s.states("other") == []
    s.finish_stops()
    assert not s.core.replicas


def test_a_lease_that_is_not_renewed_ends() -> None:
    s = Scenario([gpu("2GiB")], ONE)
    s.ask("small")
    waiting = s.ask("small")
    s.wait(61)
    assert waiting in s.grants and s.announced("lease_expired")


def test_a_renewed_lease_lasts() -> None:
    from scheduler import events as ev

    s = Scenario([gpu("2GiB")], ONE)
    first, waiting = s.ask("small"), s.ask("small")
    for _ in range(4):
        s.wait(30)
        s.send(ev.LeasesRenewed((s.grants[first].lease_id,)))
    assert waiting not in s.grants
    s.send(ev.LeasesRenewed(("lease-unknown",)))  # type: ignore[arg-type]


def test_idle_models_are_unloaded_after_keep_alive() -> None:
    s = Scenario([gpu("2GiB")], ONE, catalogue={"defaults": {"keep_alive_s": 10}})
    s.run("small")
    s.wait(9)
    assert s.loaded_models() == {"small"}
    s.wait(2)
    assert not s.core.replicas and s.announced("replica_idle")


def test_keep_alive_spares_pinned_and_busy_models() -> None:
    from scheduler import events as ev

    s = Scenario([gpu("2GiB")], {"a": SMALL, "b": SMALL}, catalogue={"defaults": {"keep_alive_s": 10}})
    s.run("a")
    s.ask("b")
    s.send(ev.PinAsked("a", True))
    s.wait(30)
    assert s.loaded_models() == {"a", "b"}


def test_unload_stops_idle_models_at_once() -> None:
    s = Scenario([gpu("2GiB")], ONE)
    s.run("small")
    s.unload("small")
    assert not s.core.replicas


def test_unload_lets_a_busy_model_finish_and_refuses_who_waits() -> None:
    s = Scenario([gpu("2GiB")], ONE)
    running, waiting = s.ask("small"), s.ask("small")
    s.unload("small")
    assert isinstance(s.error(waiting), Unavailable) and "unloaded" in s.why(waiting)
    assert s.states("small") == ["ready"]
    s.done(running)
    assert not s.core.replicas


def test_unload_ends_loading_and_pending_ones() -> None:
    s = Scenario([gpu("3GiB")], {"medium": MEDIUM, "other": (24, 2048, 5632)}, auto=False)
    s.ask("medium")
    s.unload("medium")
    assert s.states("medium") == ["stopping"]
    s.ask("other")
    assert s.states("other") == ["pending"]
    s.unload("other")
    assert s.states("other") == []
    s.finish_load("medium")  # it was loaded a moment before it was killed
    s.finish_stops()
    assert not s.core.replicas


def test_unload_and_pin_of_an_unknown_model_change_nothing() -> None:
    import pytest

    from scheduler import events as ev

    s = Scenario([gpu("2GiB")], ONE)
    with pytest.raises(UnknownModel):
        s.unload("nothing")
    with pytest.raises(UnknownModel):
        s.core.handle(ev.PinAsked("nothing", True), s.now)


def test_a_model_that_comes_up_with_less_context_has_failed() -> None:
    s = Scenario([gpu("2GiB")], ONE, auto=False)
    request = s.ask("small", n_ctx=8192)
    s.loaded(s.started[-1], n_ctx=4096)
    assert request not in s.grants and "4096" in s.announced("load_failed")[0].message
    s.finish_stops()
    s.finish_load("small")
    assert request in s.grants


def test_progress_is_kept() -> None:
    from scheduler import events as ev

    s = Scenario([gpu("2GiB")], ONE, auto=False)
    s.ask("small")
    s.send(ev.ReplicaProgressed(s.started[0].replica_id, 0.5))
    assert s.replica("small").progress == 0.5
    s.send(ev.ReplicaProgressed("gone", 0.5))  # type: ignore[arg-type]
