"""The smallest set of victims, the oldest among equals."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.choice.eviction import MOST_SETS, Victims, evictable, smallest_victims
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


def chosen(sizes: dict[str, int], need: int) -> set[str] | None:
    """Victims among replicas given oldest first."""
    found = smallest_victims([replica(name) for name in sizes], enough(sizes, need))
    return None if found is None else set(found[1])


def test_nobody_when_nothing_is_short() -> None:
    assert chosen({"a": 1}, 0) == set()


def test_none_when_all_together_are_not_enough() -> None:
    assert chosen({"a": 1, "b": 2}, 4) is None


def test_one_young_one_rather_than_two_old_ones() -> None:
    assert chosen({"old": 2, "older": 2, "young": 4}, 4) == {"young"}


def test_the_oldest_of_those_that_are_enough() -> None:
    assert chosen({"a": 1, "b": 4, "c": 4}, 4) == {"b"}
    assert chosen({"a": 2, "b": 1, "c": 2, "d": 2}, 4) == {"a", "c"}


def test_many_replicas_are_searched_from_the_oldest_and_nobody_is_stopped_in_vain() -> None:
    sizes = {f"r{i:03}": 1 for i in range(60)} | {"r003": 9}
    victims = chosen(sizes, 12)
    assert victims == {"r000", "r001", "r002", "r003"}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), max_size=30), st.integers(0, 40))
def test_victims_are_enough_and_none_of_them_is_superfluous(sizes: list[int], need: int) -> None:
    by_name = {f"r{i:02}": size for i, size in enumerate(sizes)}
    victims = chosen(by_name, need)
    if victims is None:
        assert sum(sizes) < need
        return
    total = sum(by_name[name] for name in victims)
    assert total >= need and all(total - by_name[name] < need for name in victims)
    smallest = next(n for n in range(len(sizes) + 1) if sum(sorted(sizes)[len(sizes) - n :]) >= need)
    assert len(victims) == smallest or len(sizes) > 8  # exact as long as there are few sets


def test_few_enough_sets_are_searched_exactly() -> None:
    assert MOST_SETS >= 70  # all sets of four out of eight


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
    found = evictable([ready, *others, older], lambda name: name == "pinned", 100.0, 5.0, "me")
    assert found == [older, ready]
    assert len(evictable(others, lambda name: name == "pinned", 100.0, 0.0, "somebody")) == 2
