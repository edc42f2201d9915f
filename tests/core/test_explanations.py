"""Reasons carry numbers and names."""

from __future__ import annotations

import re

from scenario import LARGE, MOE, SMALL, Scenario, gpu

from scheduler import events as ev
from scheduler.units import GIB, DeviceId

M = (24, 2048, 5632)


def reasons(s: Scenario, model: str) -> dict[str, str]:
    choice = s.core.plan(model, None, s.now).choice
    assert choice is not None
    return {f"{r.tier} {r.where}": r.reason for r in choice.rejections}


def test_who_would_be_evicted_and_what_that_frees() -> None:
    s = Scenario([gpu("3GiB"), gpu("1GiB", "gpu1")], {"a": M, "small": SMALL, "large": LARGE}, ram="8GiB")
    s.run("a")
    s.wait(9)
    assert re.fullmatch(
        r"needs 1\d\.\d GiB on gpu0; \d+\.\d MiB free of 3\.0 GiB; evicting a \(idle 9 s\) frees 2\.\d GiB",
        reasons(s, "large")["one GPU gpu0"],
    )


def test_who_is_in_the_way() -> None:
    s = Scenario([gpu("3GiB"), gpu("3GiB", "gpu1"), gpu("3GiB", "gpu2")], dict.fromkeys("abcd", M), auto=False)
    s.ask("a")
    s.finish_load("a")
    s.ask("b")
    request = s.ask("c")
    s.finish_load("c")
    s.done(request)
    s.send(ev.PinAsked("c", True))
    found = reasons(s, "d")
    assert "a is busy" in found["one GPU gpu0"]
    assert "b is loading" in found["one GPU gpu1"]
    assert "c is pinned" in found["one GPU gpu2"]


def test_others_and_lost_devices_are_named() -> None:
    s = Scenario([gpu("3GiB"), gpu("3GiB", "gpu1")], {"a": M})
    s.foreign[DeviceId("id-gpu0")] = GIB
    s.lost[DeviceId("id-gpu1")] = "Xid 79"
    s.read_devices()
    found = reasons(s, "a")
    assert "2.0 GiB free of 3.0 GiB; other programs use 1.0 GiB" in found["one GPU gpu0"]
    assert found["one GPU gpu1"] == "gpu1 cannot be used: it is lost: Xid 79"


def test_host_ram_after_evictions() -> None:
    s = Scenario([], {"a": M, "large": LARGE}, ram="16GiB")
    s.run("a")
    s.wait(9)
    plan = s.core.plan("large", None, s.now)
    assert plan.choice is not None and plan.choice.verdict == "evict"
    s.send(ev.PinAsked("a", True))
    assert re.fullmatch(
        r"needs 12\.\d GiB of host RAM; 1[01]\.\d GiB free beyond the reserve", reasons(s, "large")["CPU only host RAM"]
    )


def test_the_limit_on_active_models_is_named() -> None:
    s = Scenario([gpu("8GiB")], {"a": M, "b": M}, catalogue={"policy": {"max_active_models": 1}})
    s.ask("a")
    assert reasons(s, "b")["one GPU gpu0"] == "the limit on active models is reached"


def test_a_placement_is_described_in_one_line() -> None:
    s = Scenario([gpu("3GiB"), gpu("1GiB", "gpu1")], {"a": M, "moe": MOE, "large": LARGE})
    s.run("a")
    s.wait(7)
    s.run("moe")
    assert re.fullmatch(
        r"moe: experts in host RAM: \d+ layers \(.*iB\) on gpu[01](, \d+ layers .*)?, "
        r"experts of [12]\d layers in host RAM \(1[0-2]\.\d GiB\)(; evicting a \(idle 7 s\))?",
        s.announced("placed")[-1].message,
    )


def test_placements_on_several_machines_name_the_machine() -> None:
    s = Scenario([gpu("1GiB")], {"a": M})
    s.add_node("attic", [gpu("3GiB", "gpu0b")])
    s.run("a")
    assert "on gpu0b on attic" in s.announced("placed")[0].message


def test_what_a_request_waits_for() -> None:
    s = Scenario([gpu("3GiB")], {"a": M, "b": M}, auto=False)
    first = s.ask("a")
    assert s.why(first) == "loading"
    second = s.ask("b")
    assert s.why(second) == "waiting for a (loading)"
    s.finish_load("a")
    third = s.ask("a")
    assert s.why(third) == "all slots are taken"
    s.cancel(third)
    s.done(first)
    s.wait(10)
    assert s.why(second) == "waiting for evicted memory to come back"
