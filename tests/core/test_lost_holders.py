"""Who held a lease may vanish without a word: the client, the gateway, or the scheduler that granted it."""

from __future__ import annotations

from dataclasses import replace

from scenario import SMALL, Scenario, buffers, gpu

from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.cluster.replica import ReplicaState
from scheduler.units import LeaseId

BOX = {"gpus": [gpu("1GiB")], "models": {"a": SMALL, "b": SMALL, "c": SMALL}}


def cancelled(box: Scenario) -> list[str]:
    return [command.lease_id for command in box.log if isinstance(command, cmd.CancelAnswer)]


def test_an_expired_lease_ends_the_answer_it_was_for() -> None:
    box = Scenario(**BOX)
    lease = box.grants[box.ask("a")].lease_id
    box.now += box.core.policy.lease_ttl_s
    box.send(ev.Ticked())
    assert cancelled(box) == [lease]
    replica = box.core.replicas[box.grants["r1"].replica_id]
    assert replica.idle and replica.last_used_at == box.now


def test_a_new_gateway_voids_what_the_one_before_had_asked_for() -> None:
    box = Scenario(**BOX)
    running = box.ask("a")
    queued = box.ask("a")
    box.send(ev.ClientsLost())
    assert cancelled(box) == [box.grants[running].lease_id]
    assert box.refusals[queued].error.retry_after_s == 1.0
    assert not len(box.core.queue)
    assert box.ask("a") in box.grants  # the slot is free


def test_a_replica_that_failed_a_request_gets_no_other_before_it_was_checked() -> None:
    box = Scenario(**BOX)
    failed = box.ask("a")
    replica_id = box.grants[failed].replica_id
    del box.runners[replica_id]  # the holder of the lease is the first to see it
    waiting = box.ask("a")
    box.done(failed, failed=True)
    assert box.grants[waiting].replica_id != replica_id


def test_a_replica_that_is_vouched_for_goes_on() -> None:
    box = Scenario(**BOX)
    failed = box.ask("a")
    waiting = box.ask("a")
    box.done(failed, failed=True)
    assert box.grants[waiting].replica_id == box.grants[failed].replica_id
    assert not box.stopped


def test_a_survivor_is_adopted_with_its_leases_and_not_evicted_under_them() -> None:
    before = Scenario(**BOX)
    before.ask("a")
    (start,) = before.started
    placement = start.placement
    ready = ev.ReplicaReady(start.replica_id, 77, buffers(*placement.device_bytes), placement.context.n_ctx, 0.5)
    lease = LeaseId("lease-of-before")
    adopted = ev.ReplicaAdopted(start.replica_id, "a", start.path, placement, ready, (lease,))

    after = Scenario(**BOX)
    after.send(adopted)
    survivor = after.core.replicas[start.replica_id]
    assert survivor.leases == {lease}
    for model in ("b", "c"):  # a and b fill the card; b is idle, a is not
        after.done(after.ask(model))
    assert survivor.state is ReplicaState.READY
    after.send(ev.LeasesRenewed((lease,)))
    after.send(ev.LeaseReleased(lease))
    assert survivor.idle


def test_a_survivor_is_booked_with_what_it_took_not_with_what_was_predicted() -> None:
    before = Scenario(**BOX)
    before.ask("a")
    (start,) = before.started
    placement = start.placement
    total = gpu("1GiB").total_bytes
    predicted = replace(placement, device_bytes=(total + 1,))
    ready = ev.ReplicaReady(start.replica_id, 77, buffers(total // 2), placement.context.n_ctx, 0.5)
    after = Scenario(**BOX)
    after.send(ev.ReplicaAdopted(start.replica_id, "a", start.path, predicted, ready))
    assert not after.stopped
    assert after.core.replicas[start.replica_id].idle
