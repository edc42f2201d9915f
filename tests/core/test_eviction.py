"""The set of victims that is regretted least, found exactly while there are few."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain, combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.choice.eviction import Victims, cheapest_victims, evictable
from scheduler.cluster.replica import Placement, Replica, ReplicaState
from scheduler.costs.params import ContextParams, Layout
from scheduler.units import LeaseId, NodeId, ReplicaId

HERE = Placement("one GPU", NodeId("box"), (), Layout(), ContextParams(), (), (), 0, 0, 0, 0, False, 1)


def replica(name: str, used_at: float = 0.0, **more: object) -> Replica:
    made = Replica(ReplicaId(name), name, "", HERE, 1, 4096, 0.0, used_at, state=ReplicaState.READY)
    for key, value in more.items():
        setattr(made, key, value)
    return made


def enough(sizes: Mapping[str, int], need: int) -> Callable[[Victims], Placement | None]:
    return lambda chosen: HERE if sum(sizes[r] for r in chosen) >= need else None


def chosen(sizes: dict[str, int], need: int, regrets: dict[str, float] | None = None) -> set[str] | None:
    """Victims among replicas of these sizes, regretted as much as given (else all alike)."""
    by_name = regrets or dict.fromkeys(sizes, 1.0)
    ordered = sorted(map(replica, sizes), key=lambda each: by_name[each.replica_id])
    found = cheapest_victims(ordered, lambda each: by_name[each.replica_id], enough(sizes, need))
    return None if found is None else set(found[1])


def test_nobody_when_nothing_is_short() -> None:
    assert chosen({"a": 1}, 0) == set()


def test_none_when_all_together_are_not_enough() -> None:
    assert chosen({"a": 1, "b": 2}, 4) is None


def test_one_rather_than_several_that_are_regretted_as_much() -> None:
    assert chosen({"old": 2, "older": 2, "young": 4}, 4) == {"young"}


def test_two_that_are_hardly_regretted_rather_than_one_that_is() -> None:
    assert chosen({"a": 2, "b": 2, "c": 4}, 4, {"a": 0.1, "b": 0.2, "c": 0.4}) == {"a", "b"}


def test_the_least_regretted_of_those_that_are_enough() -> None:
    assert chosen({"a": 1, "b": 4, "c": 4}, 4, {"a": 0.1, "b": 0.2, "c": 0.3}) == {"b"}


def test_many_replicas_are_searched_from_the_least_regretted_and_nobody_is_stopped_in_vain() -> None:
    sizes = {f"r{i:03}": 1 for i in range(60)} | {"r003": 9}
    victims = chosen(sizes, 12, {name: float(i + 1) for i, name in enumerate(sizes)})
    assert victims == {"r000", "r001", "r002", "r003"}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=8), st.integers(0, 20))
def test_no_set_that_is_enough_is_regretted_less(replicas: list[tuple[int, int]], need: int) -> None:
    sizes = {f"r{i}": size for i, (size, _) in enumerate(replicas)}
    regrets = {f"r{i}": float(regret) for i, (_, regret) in enumerate(replicas)}
    victims = chosen(sizes, need, regrets)
    sets = chain.from_iterable(combinations(sizes, n) for n in range(len(sizes) + 1))
    able = [sum(regrets[r] for r in each) for each in sets if sum(sizes[r] for r in each) >= need]
    if victims is None:
        assert not able
    else:
        assert sum(sizes[r] for r in victims) >= need
        assert sum(regrets[r] for r in victims) == pytest.approx(min(able))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 5), min_size=20, max_size=30), st.integers(20, 60))
def test_of_many_none_is_superfluous(sizes: list[int], need: int) -> None:
    by_name = {f"r{i:02}": size for i, size in enumerate(sizes)}
    victims = chosen(by_name, need, {name: 1.0 + i for i, name in enumerate(by_name)})
    if victims is None:
        assert sum(sizes) < need
        return
    total = sum(by_name[name] for name in victims)
    assert total >= need and all(total - by_name[name] < need for name in victims)


def test_who_may_be_evicted() -> None:
    ready = replica("ready", 5.0)
    older = replica("older", 1.0)
    others = [
        replica("busy", leases={LeaseId("x")}),
        replica("loading", state=ReplicaState.LOADING),
        replica("pending", state=ReplicaState.PENDING),
        replica("stopping", state=ReplicaState.STOPPING),
        replica("pinned"),
        replica("fresh", ready_at=98.0),
        replica("spoken-for", drain_for="somebody"),
    ]

    def by_age(each: Replica) -> float:
        return each.last_used_at

    found = evictable([ready, *others, older], lambda each: each.model == "pinned", 100.0, 5.0, "me", by_age)
    assert found == [older, ready]
    assert len(evictable(others, lambda each: each.model == "pinned", 100.0, 0.0, "somebody", by_age)) == 2
