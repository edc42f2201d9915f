"""The demo's judges: they must be able to say no."""

from __future__ import annotations

from pathlib import Path

import pytest

from arriero.api import Notice
from arriero.demo.questions import Asked
from arriero.demo.stage import Stage
from arriero.demo.verdict import Claim, judge_eviction_order, judge_placements, show

STAGE = Stage(Path("nowhere"), (96 << 20, 64 << 20), (), (), samples=True)


def notices(*happened: tuple[str, str, str]) -> list[Notice]:
    return [
        Notice(seq=i, at_s=float(i), kind=kind, message="", model=model, data={"tier": tier})
        for i, (kind, model, tier) in enumerate(happened)
    ]


def placed(model: str, tier: str = "one GPU") -> tuple[str, str, str]:
    return "placed", model, tier


def evicted(model: str) -> tuple[str, str, str]:
    return "replica_evicted", model, ""


IN_ORDER = [
    *(placed("a"), placed("b"), placed("c")),
    *(evicted("a"), placed("d"), evicted("b"), placed("a"), evicted("c"), placed("b")),
]


def test_three_evictions_of_the_least_recently_used_hold() -> None:
    (claim,) = judge_eviction_order(STAGE, notices(*IN_ORDER))
    assert claim.holds and claim.seen == "a, then b, then c"


@pytest.mark.parametrize("swap", [(3, 5), (5, 7)])
def test_another_order_does_not_hold(swap: tuple[int, int]) -> None:
    happened = list(IN_ORDER)
    happened[swap[0]], happened[swap[1]] = happened[swap[1]], happened[swap[0]]
    (claim,) = judge_eviction_order(STAGE, notices(*happened))
    assert not claim.holds


def test_two_evictions_are_too_few() -> None:
    (claim,) = judge_eviction_order(STAGE, notices(*IN_ORDER[:6]))
    assert not claim.holds


def test_each_kind_of_place_must_have_been_seen() -> None:
    everywhere = [placed("a"), placed("b", "several GPUs"), placed("c", "experts in host RAM")]
    assert all(claim.holds for claim in judge_placements(STAGE, notices(*everywhere)))
    for missing in range(3):
        seen = [*everywhere[:missing], *everywhere[missing + 1 :]]
        assert [claim.holds for claim in judge_placements(STAGE, notices(*seen))].count(False) == 1


def test_the_summary_shows_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [Asked("m", "p", "", 0.0, 1.0, error="it broke")]
    show([Claim("all is well", False, "it is not")], asked, 12.0)
    text = capsys.readouterr().out
    assert "DOES NOT HOLD" in text and "it broke" in text
