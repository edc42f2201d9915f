"""CPU cores are booked: threads by fair shares, never more than there are cores, not even for a moment."""

from __future__ import annotations

from scenario import SMALL, Scenario, gpu

from scheduler import commands as cmd
from scheduler.cluster.ledger import cores_account
from scheduler.units import NodeId

FOUR = dict.fromkeys("abcd", SMALL)


def threads_set(s: Scenario) -> list[tuple[str, int]]:
    return [(c.replica_id.split("-")[0], c.n_threads) for c in s.log if isinstance(c, cmd.SetThreads)]


def test_a_lone_model_gets_all_cores() -> None:
    s = Scenario([], FOUR, cores=8)
    s.run("a")
    assert s.started[0].n_threads == 8


def test_newcomers_share_and_leavers_give_back() -> None:
    s = Scenario([], FOUR, cores=8)
    for model in "abc":
        s.run(model)
    assert s.threads() == {"a": 2, "b": 2, "c": 2}
    s.unload("b")
    assert s.threads() == {"a": 4, "c": 4}


def test_others_shrink_before_the_newcomer_starts() -> None:
    s = Scenario([], FOUR, cores=4)
    s.run("a")
    s.log.clear()
    s.run("b")
    order = [type(c).__name__ for c in s.log if isinstance(c, cmd.SetThreads | cmd.StartReplica)]
    assert order[:2] == ["SetThreads", "StartReplica"] and threads_set(s)[0] == ("a", 2)


def test_models_on_gpus_book_no_cores() -> None:
    s = Scenario([gpu("2GiB")], FOUR, cores=1)
    for model in "abc":
        s.run(model)
    assert s.threads() == {} and s.core.ledger.booked(cores_account(NodeId("box")), "held") == 0


def test_no_more_cpu_models_than_cores() -> None:
    s = Scenario([], FOUR, cores=2, catalogue={"policy": {"min_residency_s": 0}})
    first, second, third = s.ask("a"), s.ask("b"), s.ask("c")
    assert first in s.grants and second in s.grants and s.waits(third)
    s.done(first)
    assert third in s.grants and s.evicted() == ["a"]


def test_cores_of_a_stopping_model_are_not_given_away() -> None:
    s = Scenario([], FOUR, cores=2, auto=False, catalogue={"policy": {"min_residency_s": 0}})
    for model in "ab":
        request = s.ask(model)
        s.finish_load(model)
        s.done(request)
    s.ask("c")
    assert s.states("c") == ["pending"] and s.threads() == {"a": 1, "b": 1, "c": 1}
    s.finish_stops()
    assert s.states("c") == ["loading"]


def test_a_restart_of_the_same_model_waits_for_its_own_cores() -> None:
    s = Scenario([], FOUR, cores=3, auto=False)
    s.ask("a")
    s.fail_load("a")  # at once tried again; its first process was gone before
    assert s.states("a") == ["loading"] and s.threads() == {"a": 3}


def test_a_newcomer_starts_on_the_cores_that_are_there_and_grows() -> None:
    s = Scenario([], FOUR, cores=5, auto=False)
    for model in "ab":
        request = s.ask(model)
        s.finish_load(model)
        s.done(request)
    s.unload("a")  # holds two cores until it is gone
    s.ask("c")
    assert s.states("c") == ["loading"] and s.started[-1].n_threads == 1
    s.finish_stops()
    s.finish_load("c")
    assert s.threads() == {"b": 2, "c": 2} and threads_set(s)[-1] == ("c", 2)


def test_the_refusal_names_the_cores() -> None:
    s = Scenario([], FOUR, cores=1)
    s.ask("a")
    plan = s.core.plan("b", None, s.now)
    assert plan.choice is not None and plan.choice.verdict == "wait"
    assert "all 1 CPU cores are booked" in str(plan.choice.rejections[-1])
