"""What is loaded although no request waits for a first replica of it: kept, spread, prefetched; and pre-emption."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from scenario import LARGE, MEDIUM, SMALL, Scenario, gpu

from actors.views import plan
from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.cluster.facts import DeviceFacts, ModelFile, NodeReading
from scheduler.costs.params import Rates
from scheduler.units import GIB, DeviceId, NodeId, RequestId


def cards(*sizes: str) -> list[DeviceFacts]:
    rates = Rates(900e9, 30e12)
    return [replace(gpu(size, f"gpu{i}", kind="cuda"), rates=rates) for i, size in enumerate(sizes)]


def machine(shapes: dict[str, tuple[int, ...]], *sizes: str, auto: bool = True, **catalogue: Any) -> Scenario:
    return Scenario(cards(*sizes), shapes, catalogue=catalogue, rates=Rates(40e9, 0.5e12), auto=auto)


def entry(name: str, **params: Any) -> dict[str, Any]:
    return {name: {"path": f"{name}.gguf", **params}}


def flood(s: Scenario, model: str, count: int) -> list[str]:
    """Requests of some ten seconds each have been seen; now many come at once."""
    for _ in range(4):
        request = s.ask(model)
        s.wait(10)
        s.done(request)
    return [s.ask(model) for _ in range(count)]


# ---------------------------------------------------------------------- second replicas


def test_a_busy_model_spreads_to_a_free_gpu() -> None:
    s = machine({"a": MEDIUM}, "4GiB", "4GiB", "4GiB")
    requests = flood(s, "a", 12)
    s.wait(3)
    assert len(s.core.replicas) == 3 and len({r.placement.device_ids for r in s.core.replicas.values()}) == 3
    assert sum(request in s.grants for request in requests) == 3


def test_it_does_not_spread_for_a_wait_that_is_shorter_than_a_load() -> None:
    s = machine({"a": MEDIUM}, "4GiB", "4GiB")
    s.done(s.ask("a"))  # it is answered in no time
    held, waits = s.ask("a"), s.ask("a")
    s.wait(3)
    assert held in s.grants and s.waits(waits) and len(s.core.replicas) == 1


def test_it_spreads_no_further_than_it_may() -> None:
    s = machine({"a": MEDIUM}, "4GiB", "4GiB", "4GiB", models=entry("a", max_replicas=2))
    flood(s, "a", 12)
    s.wait(3)
    assert len(s.core.replicas) == 2


def test_nobody_is_evicted_for_a_second_replica() -> None:
    s = machine({"a": MEDIUM, "b": MEDIUM}, "4GiB", "4GiB")
    s.run("b")
    flood(s, "a", 12)
    s.wait(20)
    assert s.loaded_models() == {"a", "b"} and not s.evicted()


def test_the_plan_of_a_busy_model_says_where_another_replica_could_be() -> None:
    s = machine({"a": MEDIUM}, "4GiB", "4GiB")
    s.ask("a")
    told = plan(s.core, "a", s.core.plan("a", None, s.now), s.now)
    (option,) = told.options
    assert told.verdict == "ready" and option.tier == "one GPU"
    assert {option.shares[0].device, *s.where("a")} == {"gpu0", "gpu1"}


def test_a_longer_context_is_no_way_around_the_most_replicas() -> None:
    s = machine({"a": MEDIUM}, "8GiB", "8GiB", models=entry("a", max_replicas=1, n_ctx=2048))
    held = s.ask("a")
    longer = s.ask("a", n_ctx=4096)
    s.wait(5)
    assert s.waits(longer) and "a (busy)" in s.why(longer) and len(s.core.replicas) == 1
    next_one = s.ask("a")
    assert s.waits(next_one)  # the small one takes nothing new: else the longer one would wait for ever
    s.done(held)
    s.wait(3)
    assert longer in s.grants and [r.n_ctx for r in s.core.replicas.values()] == [4096]


def test_a_second_replica_goes_before_anybody_else() -> None:
    s = machine({"a": MEDIUM, "b": MEDIUM, "c": MEDIUM}, "4GiB", "4GiB", "4GiB")
    requests = flood(s, "a", 12)
    s.wait(3)
    s.unload("a")  # three of them are busy
    for request in requests:
        if request in s.grants:
            s.done(request)
    s.run("b")
    s.wait(300, longest_step_s=5)
    requests = flood(s, "a", 8)
    s.wait(3)
    assert [r.model for r in s.core.replicas.values()] == ["b", "a", "a"]
    for request in requests:
        if request in s.grants:
            s.done(request)
        else:
            s.cancel(request)
    s.wait(6)
    s.run("c")  # b was used longest ago, but one of the two replicas of a serves as well as both
    assert s.evicted() == ["a"] and s.loaded_models() == {"a", "b", "c"}


def test_of_two_replicas_the_less_loaded_serves_and_a_known_prompt_goes_where_it_was() -> None:
    s = machine({"a": MEDIUM}, "4GiB", "4GiB", models=entry("a", n_seq_max=4, n_ctx=8192))
    flood(s, "a", 40)
    s.wait(3)
    assert len(s.core.replicas) == 2
    for waiting in list(s.core.queue):
        s.cancel(waiting.request_id)
    busy = {replica_id: len(r.leases) for replica_id, r in s.core.replicas.items()}
    assert set(busy.values()) == {4}
    first, second = s.core.replicas
    for grant in list(s.grants.values()):
        s.send(ev.LeaseReleased(grant.lease_id))
    one = s.grants[s.ask("a", prefix="p")].replica_id
    other = s.grants[s.ask("a", prefix="q")].replica_id
    assert {one, other} == {first, second}
    assert s.grants[s.ask("a", prefix="p")].replica_id == one
    assert s.grants[s.ask("a", prefix="p")].replica_id == one  # although the other one has fewer requests


# ---------------------------------------------------------------------- kept and prefetched


def test_what_shall_always_be_loaded_is_loaded_and_stays() -> None:
    s = machine({"a": MEDIUM, "b": MEDIUM}, "4GiB", models=entry("a", min_replicas=1) | entry("b", spill=False))
    s.wait(1)
    assert s.loaded_models() == {"a"}
    refused = s.ask("b")
    s.wait(30)
    assert refused in s.refusals and s.loaded_models() == {"a"}
    s.kill("a")
    s.wait(7)
    assert s.loaded_models() == {"a"}


def test_what_was_unloaded_by_hand_is_not_kept_until_somebody_asks() -> None:
    s = machine({"a": MEDIUM}, "4GiB", models=entry("a", min_replicas=1))
    s.wait(1)
    s.unload("a")
    s.wait(30)
    assert not s.core.replicas
    s.run("a")
    s.wait(30)
    assert s.loaded_models() == {"a"}


def test_two_are_kept_on_gpus_of_their_own() -> None:
    s = machine({"a": MEDIUM}, "4GiB", "4GiB", models=entry("a", min_replicas=2))
    s.wait(12)
    assert len({r.placement.device_ids for r in s.core.replicas.values()}) == 2


@pytest.mark.parametrize(("prefetch", "loaded"), [(None, {"b"}), ("preload", {"a", "b"})])
def test_what_is_asked_for_often_is_loaded_where_a_gpu_is_free(prefetch: str, loaded: set[str]) -> None:
    s = machine({"a": MEDIUM, "b": MEDIUM}, "4GiB", "4GiB", policy={"prefetch": prefetch})
    for _ in range(10):
        s.run("a")
    s.kill("a")
    s.run("b")
    s.wait(5)
    assert s.loaded_models() == loaded


def test_what_was_preloaded_goes_first_even_while_it_loads() -> None:
    s = machine({"a": MEDIUM, "b": SMALL, "c": MEDIUM}, "5GiB", policy={"prefetch": "preload"})
    for _ in range(10):
        s.run("a")
    s.run("b")
    s.kill("a")
    s.auto = False
    s.wait(6)
    assert s.states("a")[-1] == "loading"
    waits = s.ask("c")
    assert s.states("a")[-1] == "stopping" and s.states("b") == ["ready"]
    s.finish_stops()
    s.finish_load("c")
    assert waits in s.grants


def test_nothing_is_prefetched_while_somebody_waits() -> None:
    s = machine({"a": MEDIUM, "b": MEDIUM}, "4GiB", "4GiB", policy={"prefetch": "preload"})
    for _ in range(10):
        s.run("a")
    s.run("b")
    s.auto = False
    s.ask("b")
    s.ask("b")
    s.kill("a")
    s.wait(5)
    assert s.states("a") in ([], ["stopping"])


def test_files_are_read_ahead_while_the_disk_is_idle_and_no_longer() -> None:
    s = machine({"a": MEDIUM, "b": MEDIUM}, "4GiB", policy={"prefetch": "read_ahead"})
    for model in "aaaaaabbbb":
        s.run(model)
    files = tuple(ModelFile(f"/models/{m}.gguf", (f"/models/{m}.gguf",), 1000, 1.0, 0.0) for m in "ab")
    s.send(ev.NodeSampled(NodeReading(NodeId("box"), 60 * GIB, s.now, files)))
    s.wait(6)
    assert [c.path for c in s.log if isinstance(c, cmd.ReadAhead)] == ["/models/a.gguf"]
    s.run("a")  # its load needs the disk
    assert [c.path for c in s.log if isinstance(c, cmd.StopReadAhead)] == ["/models/a.gguf"]
    s.send(ev.ReadAheadEnded(NodeId("box"), "/models/a.gguf"))
    s.wait(6)
    assert [c.path for c in s.log if isinstance(c, cmd.ReadAhead)][-1] == "/models/b.gguf"


# ---------------------------------------------------------------------- pre-emption


def contest(**policy: Any) -> tuple[Scenario, str, str]:
    """A model is being used, and somebody with priority wants another that does not fit beside it."""
    models = entry("a", spill=False) | entry("b", spill=False)
    s = machine(
        {"a": MEDIUM, "b": MEDIUM},
        "4GiB",
        policy=policy | {"lease_ttl_s": 1000, "request_priority_max": 10},
        models=models,
    )
    held = s.ask("a")
    s.wait(6)
    urgent = s.ask("b", priority=5)
    return s, held, urgent


def test_without_the_user_s_leave_nobody_is_preempted() -> None:
    s, held, urgent = contest()
    s.wait(120)
    assert s.waits(urgent) and not s.announced("replica_preempted")
    s.done(held)
    assert urgent in s.grants


def test_it_is_drained_first_and_then_its_answers_end() -> None:
    s, held, urgent = contest(preempt_after_s=10)
    s.wait(4)
    assert s.replica("a").drain_for == "b" and s.waits(urgent)
    s.wait(12)
    assert urgent in s.grants and s.announced("replica_preempted")
    assert [c.lease_id for c in s.log if isinstance(c, cmd.CancelAnswer)] == [s.grants[held].lease_id]


def test_the_same_priority_preempts_nobody() -> None:
    s, _, _ = contest(preempt_after_s=1)
    for waiting in list(s.core.queue):
        s.cancel(waiting.request_id)
    plain = s.ask("b")
    s.wait(60)
    assert s.waits(plain) and not s.announced("replica_preempted")


def test_of_two_replicas_one_stays_however_much_room_is_wanted() -> None:
    """Either of them could be spared, but not both: the model would have to be loaded again."""
    s = machine(
        {"a": MEDIUM, "big": LARGE}, "8GiB", "8GiB", models=entry("a", min_replicas=1) | entry("big", spill=False)
    )
    flood(s, "a", 12)
    s.wait(3)
    assert len(s.core.replicas) == 2
    for waiting in list(s.core.queue):
        s.cancel(waiting.request_id)
    for grant in list(s.grants.values()):
        s.send(ev.LeaseReleased(grant.lease_id))
    s.wait(10)
    refused = s.ask("big")  # it would need both GPUs, and all of them
    s.wait(30)
    assert refused in s.refusals and "a" in s.loaded_models()


def test_the_replica_that_was_used_last_is_the_one_that_stays() -> None:
    s = machine({"a": MEDIUM, "b": MEDIUM, "c": MEDIUM}, "4GiB", "4GiB")
    requests = flood(s, "a", 6)
    s.wait(3)
    for request in requests:
        s.done(request) if request in s.grants else s.cancel(request)
    s.wait(10)
    (first, second) = s.core.replicas.values()
    s.send(ev.LeaseReleased(s.core.fleet.leases.grant(RequestId("again"), first, s.now).lease_id))
    s.wait(10)
    s.run("b")
    assert second.replica_id not in s.core.replicas and first.replica_id in s.core.replicas


# ---------------------------------------------------------------------- moving


def in_host_ram(**catalogue: Any) -> Scenario:
    """A model that had to be loaded into host RAM; now the GPU is free."""
    s = machine({"a": MEDIUM}, "4GiB", **catalogue)
    s.foreign[DeviceId("id-gpu0")] = 3 * GIB
    s.read_devices()
    s.run("a")
    assert s.tier("a") != "one GPU"
    s.foreign.clear()
    s.read_devices()
    s.wait(20)
    return s


def test_a_model_in_host_ram_moves_to_a_gpu_that_has_come_free() -> None:
    s = in_host_ram()
    s.run("a")
    assert s.tier("a") == "one GPU" and s.announced("replica_moved")
    assert s.replica("a").n_ctx == 8192


def test_it_does_not_move_under_a_request_that_could_not_wait_for_it() -> None:
    s = in_host_ram()
    assert s.ask("a", deadline_s=0.3) in s.grants and not s.announced("replica_moved")


def test_one_that_is_never_idle_moves_as_well_and_ends_no_answer_for_it() -> None:
    s, answers = always_busy_in_host_ram()
    before = s.replica("a").replica_id
    answers.append(s.ask("a"))
    assert s.grants[answers[-1]].replica_id == before and s.announced("replica_moved")
    s.wait(5)
    later = s.ask("a")
    assert s.grants[later].replica_id != before and before in s.core.replicas
    for answer in answers:
        s.done(answer)
    s.wait(5)
    assert before not in s.core.replicas and s.tier("a") == "one GPU" and len(s.started) == 2


def test_what_it_moves_for_keeps_to_the_most_replicas_it_may_have() -> None:
    s, _ = always_busy_in_host_ram(max_replicas=1)
    s.ask("a")
    s.wait(30)
    assert len(s.core.replicas) == 1 and not s.announced("replica_moved")


def always_busy_in_host_ram(**params: Any) -> tuple[Scenario, list[str]]:
    """A model that was loaded into host RAM and has been answering ever since; now the GPU is free."""
    s = machine({"a": MEDIUM}, "4GiB", models=entry("a", n_seq_max=4, n_ctx=8192, **params))
    s.foreign[DeviceId("id-gpu0")] = 4 * GIB
    s.read_devices()
    answers = [s.ask("a")]
    assert s.tier("a") == "CPU only"
    s.foreign.clear()
    s.read_devices()
    s.wait(20)
    return s, answers


def test_a_short_request_does_not_make_its_context_shorter() -> None:
    s = in_host_ram()
    for n_ctx in (512, None, 512, None):
        s.run("a", n_ctx)
        s.wait(15)
    assert s.replica("a").n_ctx == 8192 and len(s.started) == 2


def test_loading_a_model_is_no_answer_of_it() -> None:
    s = machine({"a": MEDIUM}, "4GiB")
    s.run("a")
    service_s = s.core.models.by_name["a"].service.mean_s
    for _ in range(8):
        s.done(s.ask("a", kind="load"))
    assert s.core.models.by_name["a"].service.mean_s == service_s > 0


def test_what_goes_when_it_is_idle_is_not_preloaded() -> None:
    s = machine({"a": MEDIUM}, "4GiB", policy={"prefetch": "preload"}, models=entry("a", keep_alive_s=10))
    for _ in range(10):
        s.run("a")
    s.wait(60)
    assert not s.core.replicas and len(s.started) == 1


def test_a_client_says_how_long_a_model_may_be_idle() -> None:
    """Until another one says otherwise; it is no longer pinned then, if a client pinned it."""
    s = machine({"a": MEDIUM}, "4GiB")
    s.run("a")
    s.send(ev.KeepAliveAsked("a", -1.0))
    assert s.core.models.by_name["a"].pinned
    s.send(ev.KeepAliveAsked("a", 5.0))
    s.wait(4)
    assert len(s.core.replicas) == 1
    s.wait(3)
    assert not s.core.replicas
    s.send(ev.KeepAliveAsked("a", 60.0))
    s.run("a")
    s.wait(30)
    assert len(s.core.replicas) == 1
    assert len(s.announced("model_keep_alive")) == 2


@pytest.mark.parametrize("by_catalogue", [True, False])
def test_who_pins_a_model_by_name_is_not_undone_by_a_client(by_catalogue: bool) -> None:
    s = machine({"a": MEDIUM}, "4GiB", models=entry("a", pinned=by_catalogue))
    s.run("a")
    s.send(ev.PinAsked("a", True))
    s.send(ev.KeepAliveAsked("a", -1.0))
    s.send(ev.KeepAliveAsked("a", 5.0))
    s.send(ev.UnloadAsked("a", unless_wanted=True))
    s.wait(10)
    assert s.core.models.by_name["a"].pinned and len(s.core.replicas) == 1


def test_who_pinned_a_model_as_a_client_may_unload_it_as_one() -> None:
    s = machine({"a": MEDIUM}, "4GiB")
    s.run("a")
    s.send(ev.KeepAliveAsked("a", -1.0))
    s.send(ev.UnloadAsked("a", unless_wanted=True))
    s.wait(10)
    assert not s.core.models.by_name["a"].pinned and not s.core.replicas


def test_an_unload_unless_it_is_wanted_takes_nothing_from_anybody() -> None:
    s = machine({"a": MEDIUM}, "4GiB")
    asked = s.ask("a")
    s.send(ev.UnloadAsked("a", unless_wanted=True))
    assert s.waits(asked) or asked in s.grants
    s.wait(30)
    assert asked in s.grants
    s.send(ev.UnloadAsked("a", unless_wanted=True))
    other = s.ask("a")
    assert len(s.core.replicas) == 1 and s.replica("a").open
    s.done(asked)
    s.wait(1)
    if other in s.grants:
        s.done(other)
    s.send(ev.UnloadAsked("a", unless_wanted=True))
    s.wait(5)
    assert not s.core.replicas
