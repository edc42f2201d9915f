"""Who is served first: priorities that age, keys that share, a bound, and a place for the newcomer in a full queue."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenario import MEDIUM, SMALL, Scenario, gpu

from scheduler.cluster.queue import RequestQueue, Waiting
from scheduler.config import Policy
from scheduler.errors import DeadlineExceeded, QueueFull, Rejected
from scheduler.units import RequestId


def waiting(name: str, at: float = 0.0, *, model: str = "m", priority: int = 0, key: str = "") -> Waiting:
    return Waiting(RequestId(name), model, "generate", None, at, at + 600, priority, key)


def queue(**policy: float) -> RequestQueue:
    return RequestQueue(Policy.model_validate(policy))


def order(waits: list[Waiting], **policy: float) -> list[str]:
    """Names in the order in which they are served."""
    line = queue(**policy)
    for each in waits:
        line.add(each)
    return [each.request_id for each in line.of_model("m")]


def test_first_come_first_served() -> None:
    assert order([waiting("a", 0), waiting("b", 1), waiting("c", 2)]) == ["a", "b", "c"]


def test_a_higher_priority_is_worth_so_many_seconds_of_waiting() -> None:
    early, late = waiting("plain", 0), waiting("plain, late", 50)
    urgent = waiting("urgent", 40, priority=1)
    assert order([early, late, urgent], priority_s=30) == ["plain", "urgent", "plain, late"]
    assert order([early, late, urgent], priority_s=60) == ["urgent", "plain", "plain, late"]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(0, 1000), st.integers(-10, 10), st.sampled_from(["", "x", "y"])), max_size=30))
def test_nobody_is_overtaken_for_longer_than_the_bound(arrivals: list[tuple[float, int, str]]) -> None:
    """By whoever comes within the difference of priorities and what one's own key has waiting, and by nobody else."""
    line = queue(priority_s=60, fair_share_s=10)
    ahead: dict[str, int] = {}
    for i, (at, priority, key) in enumerate(sorted(arrivals)):
        each = waiting(str(i), at, priority=priority, key=key)
        ahead[each.request_id] = sum(other.key == key for other in line) if key else 0
        line.add(each)
    served = line.of_model("m")
    for position, each in enumerate(served):
        for earlier in served[:position]:
            bound_s = 60 * (earlier.priority - each.priority) + 10 * ahead[each.request_id]
            assert earlier.arrived_at - each.arrived_at <= bound_s + 1e-6


def test_a_key_that_sends_many_at_once_finds_others_between_them() -> None:
    flood = [waiting(f"x{i}", 0, key="x") for i in range(4)]
    other = waiting("y", 12, key="y")
    assert order([*flood, other], fair_share_s=10) == ["x0", "x1", "y", "x2", "x3"]
    assert order([*flood, other], fair_share_s=0) == ["x0", "x1", "x2", "x3", "y"]


def test_requests_without_a_key_share_nothing() -> None:
    assert order([waiting(f"x{i}", i) for i in range(3)] + [waiting("late", 5)], fair_share_s=10)[-1] == "late"


def test_in_a_full_queue_the_key_that_has_the_most_gives_way() -> None:
    line = queue(queue_limit=4)
    for i in range(4):
        line.add(waiting(f"x{i}", i, key="x"))
    displaced = line.add(waiting("y0", 9, key="y"))
    assert displaced is not None and displaced.request_id == "x3" and len(line) == 4
    displaced = line.add(waiting("y1", 9, key="y"))
    assert displaced is not None and displaced.request_id == "x2"
    for key in "xy":  # both have two: neither gains by taking from the other
        with pytest.raises(QueueFull):
            line.add(waiting(f"{key}9", 9, key=key))
    assert len(line) == 4


def test_in_a_full_queue_the_last_request_of_lower_priority_gives_way_to_its_own_key() -> None:
    line = queue(queue_limit=3)
    for name in ("a", "b", "c"):
        line.add(waiting(name, key="ann"))
    displaced = line.add(waiting("urgent", 1.0, priority=5, key="ann"))
    assert displaced is not None and displaced.request_id == "c"
    with pytest.raises(QueueFull):
        line.add(waiting("alike", 2.0, key="ann"))


def test_a_full_queue_says_when_a_place_comes_free() -> None:
    line = queue(queue_limit=3)
    for i in range(3):
        line.add(waiting(f"a{i}"))
    with pytest.raises(QueueFull) as refused:
        line.add(waiting("one too many"))
    assert refused.value.retry_after_s == 1.0
    for i, at in enumerate((10.0, 17.0, 24.0)):
        line.served(line.of_model("m")[0], at)
        line.add(waiting(f"b{i}"))
    with pytest.raises(QueueFull, match="every 7 s") as refused:
        line.add(waiting("another"))
    assert refused.value.retry_after_s == pytest.approx(7.0)


def test_an_id_waits_once() -> None:
    line = queue()
    line.add(waiting("a"))
    with pytest.raises(Rejected):
        line.add(waiting("a"))


def test_models_come_in_the_order_of_their_first_requests() -> None:
    line = queue(priority_s=60)
    line.add(waiting("a", 0, model="late"))
    line.add(waiting("b", 5, model="urgent", priority=2))
    assert [head.model for head in line.heads()] == ["urgent", "late"]
    line.remove(RequestId("b"))
    assert [head.model for head in line.heads()] == ["late"] and line.length("urgent") == 0


# ---------------------------------------------------------------------- through the core


def test_a_request_s_own_priority_or_its_model_s_decides() -> None:
    s = Scenario([gpu("4GiB")], {"a": MEDIUM}, catalogue={"policy": {"request_priority_max": 5}})
    first = s.ask("a")
    plain, urgent = s.ask("a"), s.ask("a", priority=3)
    s.wait(1)
    s.done(first)
    assert urgent in s.grants and s.waits(plain)


def test_nobody_claims_more_than_the_catalogue_allows() -> None:
    s = Scenario([gpu("4GiB")], {"a": MEDIUM})
    first = s.ask("a")
    plain, pushing, modest = s.ask("a"), s.ask("a", priority=10), s.ask("a", priority=-1)
    s.wait(1)
    s.done(first)
    assert plain in s.grants and s.waits(pushing) and s.waits(modest)


def test_whoever_is_displaced_is_refused() -> None:
    s = Scenario([gpu("4GiB")], {"a": MEDIUM}, catalogue={"policy": {"queue_limit": 2}})
    s.ask("a")
    greedy = [s.ask("a", key="greedy") for _ in range(2)]
    modest = s.ask("a", key="modest")
    assert s.waits(modest) and s.waits(greedy[0])
    assert isinstance(s.error(greedy[1]), QueueFull)


def test_a_deadline_that_a_load_cannot_meet_is_refused_at_once() -> None:
    """Loads are measured: the second one is known to take as long as the first."""
    s = Scenario([gpu("4GiB")], {"a": MEDIUM, "b": MEDIUM})
    s.run("a")
    load_s = s.replica("a").load_s
    s.unload("a")
    late = s.ask("a", deadline_s=0.5 * load_s)
    assert isinstance(s.error(late), DeadlineExceeded) and "loading it takes" in s.why(late)
    assert s.error(late).retry_after_s == pytest.approx(load_s, rel=0.1)
    assert s.ask("a", deadline_s=2 * load_s) in s.grants


def test_who_has_waited_too_long_hears_how_long_the_next_would_wait() -> None:
    s = Scenario([gpu("4GiB")], {"a": SMALL})
    for _ in range(4):
        s.run("a")  # a second each
    s.ask("a")
    for _ in range(5):
        s.ask("a")
    late = s.ask("a", deadline_s=6.0)
    s.wait(6.5)
    assert "waited" in s.why(late) and s.error(late).retry_after_s == pytest.approx(5, rel=0.1)


def test_a_deadline_that_the_line_before_it_cannot_meet_is_refused_at_once() -> None:
    s = Scenario([gpu("4GiB")], {"a": SMALL})
    for _ in range(4):
        s.run("a")  # a second each
    held = s.ask("a")
    waits = [s.ask("a") for _ in range(10)]
    late = s.ask("a", deadline_s=5.0)
    assert "10 requests are before it" in s.why(late) and s.error(late).retry_after_s == pytest.approx(10, rel=0.1)
    assert s.waits(s.ask("a", deadline_s=15.0))
    assert held in s.grants and all(map(s.waits, waits))
