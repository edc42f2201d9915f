"""Requests under which runners end: tried once more, alone, and then refused. Nobody else pays for them."""

from __future__ import annotations

import pytest
from scenario import SMALL, Scenario, gpu

from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.cluster import suspects
from scheduler.errors import Condemned, Unavailable

SLOTS = {"defaults": {"n_ctx": 2048, "n_seq_max": 4}}


def box() -> Scenario:
    return Scenario([gpu("1GiB")], {"a": SMALL}, catalogue=SLOTS)


def dies(s: Scenario, *answering: str, noticed_by_client: bool = True) -> None:
    """The runner ends while it answers these requests; their holders notice first, or the scheduler does."""
    replica_id = s.grants[answering[0]].replica_id
    s.runners.pop(replica_id)
    if noticed_by_client:
        for request in answering:
            s.done(request, failed=True)  # the check that follows finds the runner dead
    else:
        s.send(ev.ReplicaDied(replica_id, "GGML_ASSERT(buffer) failed"))


@pytest.mark.parametrize("noticed_by_client", [True, False])
def test_a_request_that_ends_two_runners_is_refused(noticed_by_client: bool) -> None:
    s = box()
    for _ in range(2):
        dies(s, s.ask("a", fingerprint="poison"), noticed_by_client=noticed_by_client)
    refused = s.ask("a", fingerprint="poison")
    error = s.error(refused)
    assert isinstance(error, Condemned) and "change the request" in error.message
    assert noticed_by_client or "GGML_ASSERT(buffer) failed" in error.message
    assert s.announced("request_condemned")
    assert s.ask("a", fingerprint="harmless") in s.grants  # one of the model's three attempts is used up, not all


def test_who_waits_with_the_same_request_is_refused_too() -> None:
    s = box()
    dies(s, s.ask("a", fingerprint="poison"))
    second = s.ask("a", fingerprint="poison")
    third = s.ask("a", fingerprint="poison")
    assert s.waits(third)
    dies(s, second, noticed_by_client=False)
    assert isinstance(s.error(third), Condemned)


def test_bystanders_are_tried_alone_and_cleared() -> None:
    s = box()
    poison, innocent = (s.ask("a", fingerprint=each) for each in ("poison", "innocent"))
    dies(s, poison, innocent, noticed_by_client=False)
    poison, innocent, newcomer = (s.ask("a", fingerprint=each) for each in ("poison", "innocent", "newcomer"))
    assert poison in s.grants and s.waits(innocent) and s.waits(newcomer)
    dies(s, poison, noticed_by_client=False)
    assert innocent in s.grants and s.waits(newcomer)
    s.done(innocent)
    assert newcomer in s.grants
    assert isinstance(s.error(s.ask("a", fingerprint="poison")), Condemned)
    assert s.ask("a", fingerprint="innocent") in s.grants
    assert s.ask("a", fingerprint="another") in s.grants  # beside it: it is no suspect any more


def test_who_comes_between_a_failure_and_its_cause_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner ends, the client that it answered says so, and the check of the runner takes a while."""
    s = box()
    dies(s, s.ask("a", fingerprint="bystander"))
    poison = s.ask("a", fingerprint="new poison")
    replica_id = s.grants[poison].replica_id
    carry_out = s._carry_out
    monkeypatch.setattr(s, "_carry_out", lambda each: isinstance(each, cmd.CheckReplica) or carry_out(each))
    s.done(poison, failed=True)
    bystander, newcomer = (s.ask("a", fingerprint=each) for each in ("bystander", "newcomer"))
    assert s.waits(bystander) and s.waits(newcomer)
    s.runners.pop(replica_id)
    monkeypatch.undo()
    s.send(ev.ReplicaDied(replica_id, "GGML_ASSERT(buffer) failed"))
    assert bystander in s.grants
    s.done(bystander)
    assert newcomer in s.grants and not s.announced("request_condemned")


def test_a_suspect_waits_until_its_replica_is_idle() -> None:
    s = box()
    dies(s, s.ask("a", fingerprint="suspect"))
    running = s.ask("a", fingerprint="other")
    suspect = s.ask("a", fingerprint="suspect")
    behind = s.ask("a", fingerprint="behind")
    assert s.waits(suspect) and s.waits(behind)
    s.done(running)
    assert suspect in s.grants and s.waits(behind)
    s.cancel(suspect)
    assert s.waits(behind), "it may still be computed"
    s.wait(suspects.LEFT_S)
    assert behind in s.grants


def leaves(s: Scenario, request: str) -> None:
    """The client disconnects, in the middle of the answer."""
    s.send(ev.LeaseReleased(s.grants[request].lease_id, "left"))


def test_who_leaves_before_its_runner_ends_is_refused_as_who_stays() -> None:
    s = box()
    for _ in range(2):
        poison = s.ask("a", fingerprint="poison")
        replica_id = s.grants[poison].replica_id
        leaves(s, poison)
        s.runners.pop(replica_id)
        s.send(ev.ReplicaDied(replica_id, "GGML_ASSERT(buffer) failed"))
    assert isinstance(s.error(s.ask("a", fingerprint="poison")), Condemned)
    assert s.ask("a", fingerprint="harmless") in s.grants


def test_who_is_alone_with_what_another_left_behind_is_not_blamed_for_it() -> None:
    s = box()
    dies(s, *(s.ask("a", fingerprint=each) for each in ("poison", "innocent")), noticed_by_client=False)
    poison = s.ask("a", fingerprint="poison")
    replica_id = s.grants[poison].replica_id
    innocent = s.ask("a", fingerprint="innocent")
    leaves(s, poison)
    assert s.waits(innocent)
    s.runners.pop(replica_id)
    s.send(ev.ReplicaDied(replica_id, "GGML_ASSERT(buffer) failed"))
    assert innocent in s.grants and isinstance(s.error(s.ask("a", fingerprint="poison")), Condemned)
    s.done(innocent)
    assert s.ask("a", fingerprint="innocent") in s.grants


def test_a_bystander_that_left_long_ago_is_no_suspect() -> None:
    s = box()
    leaves(s, s.ask("a", fingerprint="bystander"))
    s.wait(suspects.LEFT_S)
    dies(s, s.ask("a", fingerprint="other"))
    first, second = (s.ask("a", fingerprint=each) for each in ("bystander", "new"))
    assert first in s.grants and second in s.grants


def test_a_long_answer_is_not_alone_to_its_end() -> None:
    """It stays a suspect. But who is not alone is not condemned, and nobody who has joined it."""
    s = box()
    dies(s, s.ask("a", fingerprint="long"))
    long, behind = (s.ask("a", fingerprint=each) for each in ("long", "behind"))
    assert s.waits(behind)
    s.wait(suspects.ALONE_S)
    assert behind in s.grants
    dies(s, long, behind, noticed_by_client=False)
    again = s.ask("a", fingerprint="behind")
    assert again in s.grants and not s.announced("request_condemned")


def test_a_suspect_that_leaves_again_and_again_does_not_have_the_replica_to_itself() -> None:
    s = box()
    dies(s, s.ask("a", fingerprint="suspect"))
    leaves(s, s.ask("a", fingerprint="suspect"))
    waiting, other = s.ask("a", fingerprint="suspect"), s.ask("a", fingerprint="other")
    s.wait(suspects.LEFT_S)
    assert other in s.grants and isinstance(s.error(waiting), Unavailable)
    refused = s.error(s.ask("a", fingerprint="suspect"))
    assert isinstance(refused, Unavailable) and "next try in 60 s" in refused.message
    assert refused.retry_after_s == pytest.approx(suspects.REST_S)
    s.done(other)
    s.wait(suspects.REST_S)
    leaves(s, s.ask("a", fingerprint="suspect"))
    s.wait(suspects.LEFT_S)
    assert "next try in 120 s" in s.why(s.ask("a", fingerprint="suspect"))
    s.wait(2 * suspects.REST_S)
    s.done(s.ask("a", fingerprint="suspect"))
    assert s.ask("a", fingerprint="suspect") in s.grants and s.ask("a", fingerprint="other") in s.grants


def test_who_leaves_says_nothing_of_how_long_answers_take() -> None:
    s = box()
    s.done(s.ask("a"))
    known = s.core.models.by_name["a"].service
    before = repr(known)
    leaves(s, s.ask("a"))
    assert repr(known) == before


def test_a_runner_that_lives_makes_nobody_a_suspect() -> None:
    s = box()
    failed = s.ask("a", fingerprint="x")
    s.done(failed, failed=True)  # a decode that failed: the check finds the runner well
    assert s.ask("a", fingerprint="x") in s.grants
    assert s.ask("a", fingerprint="y") in s.grants


def test_a_runner_that_was_killed_makes_nobody_a_suspect() -> None:
    s = box()
    asked = [s.ask("a", fingerprint=each) for each in ("x", "y")]
    replica_id = s.grants[asked[0]].replica_id
    s.done(asked[1], failed=True)
    s.runners.pop(replica_id)
    s.send(ev.ReplicaDied(replica_id, "its process ended without a message", by_itself=False))
    again = [s.ask("a", fingerprint=each) for each in ("x", "y")]
    assert all(request in s.grants for request in again)  # side by side, as before


def test_a_model_that_ends_its_runners_under_different_requests_is_paused() -> None:
    s = box()
    for fingerprint in ("x", "y", "z"):
        dies(s, s.ask("a", fingerprint=fingerprint), noticed_by_client=False)
    error = s.error(s.ask("a", fingerprint="w"))
    assert isinstance(error, Unavailable) and "its process ended while answering" in error.message


def test_the_condemned_may_try_again_much_later() -> None:
    s = box()
    for _ in range(2):
        dies(s, s.ask("a", fingerprint="poison"))
    s.now += suspects.REMEMBERED_S
    s.read_devices()
    assert s.ask("a", fingerprint="poison") in s.grants


def test_requests_without_a_fingerprint_are_never_refused_for_it() -> None:
    s = box()
    for _ in range(2):
        dies(s, s.ask("a"))
    assert s.ask("a") in s.grants


def test_what_is_remembered_is_bounded() -> None:
    known = suspects.Suspects()
    for number in range(suspects.MOST_REMEMBERED + 10):
        known.died(suspects.ReplicaId("r"), "a", [str(number)], "died", 1.0)
    assert not known.knows("a", "9") and known.knows("a", "10")
