"""Speeds are predicted from bytes and operations, and follow what was measured."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from scenario import MOE, Scenario, gpu, shape

from scheduler import events as ev
from scheduler.costs.measurements import Record
from scheduler.costs.paces import Estimate, Pace, Paces
from scheduler.costs.params import ContextParams, DeviceSpec, Layout, Rates
from scheduler.costs.speed import HOP_S, load_seconds, seconds_per_token

M = (24, 2048, 5632)
MODEL = shape(*M)
CONTEXT = ContextParams()
CARD, HOST = Rates(1e12, 1e14), Rates(5e10, 1e12)
ON_CARD = Layout((DeviceSpec("d0"),), -1, (1.0,))
TWO_CARDS = Layout((DeviceSpec("d0"), DeviceSpec("d1")), -1, (12.0, 13.0))


def test_a_token_reads_every_weight_but_the_embedding_once() -> None:
    answer, _ = seconds_per_token(MODEL, ON_CARD, CONTEXT, (CARD,), HOST, 0)
    assert answer == pytest.approx((MODEL.weights_bytes - MODEL.stored.input) / 1e12)


def test_the_cache_is_read_too() -> None:
    empty, long = (seconds_per_token(MODEL, ON_CARD, CONTEXT, (CARD,), HOST, n)[0] for n in (0, 1000))
    per_token = sum(2 * (kind.k_width + kind.v_width) for kind in MODEL.arch.layers)
    assert long - empty == pytest.approx(1000 * per_token / 1e12)


def test_two_equal_cards_are_as_fast_as_one_but_for_the_hop() -> None:
    one, _ = seconds_per_token(MODEL, ON_CARD, CONTEXT, (CARD,), HOST, 100)
    two, _ = seconds_per_token(MODEL, TWO_CARDS, CONTEXT, (CARD, CARD), HOST, 100)
    assert two - one == pytest.approx(HOP_S)


def test_layers_in_ram_slow_it_down_by_their_bytes() -> None:
    times = [
        seconds_per_token(MODEL, replace(ON_CARD, n_gpu_layers=n), CONTEXT, (CARD,), HOST, 0)[0] for n in range(26)
    ]
    assert times == sorted(times, reverse=True) and times[0] == pytest.approx(20 * times[25], rel=0.05)


def test_only_the_experts_in_use_are_read() -> None:
    moe = shape(*MOE)
    experts = sum(layer.experts for layer in moe.stored.layers)
    answer, _ = seconds_per_token(moe, ON_CARD, CONTEXT, (CARD,), HOST, 0)
    assert answer == pytest.approx((moe.weights_bytes - moe.stored.input - 0.75 * experts) / 1e12)  # 2 of 8 in use
    apart, _ = seconds_per_token(moe, replace(ON_CARD, experts_on_host=True), CONTEXT, (CARD,), HOST, 0)
    assert apart > 0.25 * experts / HOST.bytes_per_s


def test_prompts_are_arithmetic_unless_the_batch_is_tiny() -> None:
    _, prompt = seconds_per_token(MODEL, ON_CARD, CONTEXT, (CARD,), HOST, 0)
    elements = sum(layer.weights_elements for layer in MODEL.stored.layers)
    assert prompt == pytest.approx(2 * elements / CARD.flops, rel=0.01)
    answer, tiny = seconds_per_token(MODEL, ON_CARD, ContextParams(n_ubatch=1), (CARD,), HOST, 0)
    assert tiny == pytest.approx(answer, rel=0.07)


def test_a_device_without_rates_has_no_speed() -> None:
    with pytest.raises(ValueError, match="no speed"):
        seconds_per_token(MODEL, ON_CARD, CONTEXT, (Rates(),), HOST, 0)


def test_the_page_cache_is_faster_than_a_disk() -> None:
    assert load_seconds(10**10, 1.0) < load_seconds(10**10, 0.5) < load_seconds(10**10, 0.0)


# ---------------------------------------------------------------------- what was learned


def test_a_correction_follows_what_was_measured_and_knows_its_error() -> None:
    paces = Paces()
    assert paces.corrected(1.0, ["a"]) == Estimate(1.0, None, 0)
    paces.learn(1.0, 2.0, ["a"])
    assert paces.corrected(3.0, ["a"]) == Estimate(pytest.approx(6.0), None, 1)  # type: ignore[arg-type]
    records = paces.learn(1.0, 2.2, ["a"])
    found = paces.corrected(1.0, ["a"])
    assert found.seconds == pytest.approx(math.sqrt(2.0 * 2.2))
    assert found.error == pytest.approx(0.1) and found.samples == 2
    assert Paces(records).corrected(1.0, ["a"]) == found  # across a restart


def test_what_is_known_of_the_model_goes_before_what_is_known_of_the_hardware() -> None:
    paces = Paces()
    paces.learn(1.0, 4.0, ["model", "hardware"])
    paces.learn(1.0, 1.0, ["other model", "hardware"])
    assert paces.corrected(1.0, ["model", "hardware"]).seconds == pytest.approx(4.0)
    assert paces.corrected(1.0, ["a third", "hardware"]).seconds == pytest.approx(2.0)


def test_many_measurements_settle_the_error() -> None:
    paces = Paces()
    for _ in range(60):
        paces.learn(1.0, 3.0, ["a"])
    found = paces.corrected(1.0, ["a"])
    assert found.seconds == pytest.approx(3.0) and found.error == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("measured_s", [0.0, -1.0, 1e9, 1e-9])
def test_absurd_measurements_teach_nothing(measured_s: float) -> None:
    assert Paces().learn(1.0, measured_s, ["a"]) == []


@pytest.mark.parametrize(
    "value",
    [{}, {"log_factor": "x", "error": 0, "samples": 1}, {"log_factor": float("nan"), "error": 0.0, "samples": 1}],
)
def test_records_that_make_no_sense_are_left_out(value: dict[str, object]) -> None:
    assert Paces([Record("pace", "a", value)]).corrected(1.0, ["a"]) == Estimate(1.0, None, 0)


# ---------------------------------------------------------------------- in the scheduler


def fast(size: str) -> Scenario:
    return Scenario([replace(gpu(size, kind="cuda"), rates=CARD)], {"a": M, "b": (24, 2048, 5504)}, rates=HOST)


def speed(s: Scenario, model: str):  # type: ignore[no-untyped-def]
    return s.core.speeds.predict(shape(*s.models[model]), s.replica(model).placement, 0.0)


def test_answers_and_loads_correct_later_predictions() -> None:
    s = fast("16GiB")
    request = s.ask("a")
    before = speed(s, "a")
    assert before.answer.samples == 0 and before.load.samples == 1  # the load has been seen
    pace = Pace(prompt_tokens=100, prompt_s=1.0, answer_tokens=50, answer_s=5.0, n_past=512)
    s.send(ev.LeaseReleased(s.grants[request].lease_id, pace=pace))
    after = speed(s, "a")
    assert after.answer.seconds == pytest.approx(0.1, rel=0.01) and after.prompt.seconds == pytest.approx(0.01)
    s.run("b")  # another model on the same hardware starts from what the first has shown
    assert speed(s, "b").answer.seconds == pytest.approx(0.1, rel=0.1)
    again = Scenario(s.gpus, s.models, records=s.remembered(), rates=HOST)
    again.run("a")
    assert speed(again, "a").answer.seconds == pytest.approx(after.answer.seconds)


def test_without_rates_only_the_load_is_predicted() -> None:
    s = Scenario([gpu("16GiB", kind="cuda")], {"a": M})
    request = s.ask("a")
    found = speed(s, "a")
    assert found.answer is None and found.prompt is None and found.load.seconds > 0
    s.send(ev.LeaseReleased(s.grants[request].lease_id, pace=Pace(100, 1.0, 50, 5.0, 512)))
    assert speed(s, "a").answer is None


def test_a_card_that_tells_only_one_of_its_rates_has_no_known_speed() -> None:
    half = replace(gpu("8GiB", kind="cuda"), rates=Rates(0.0, 1e13))
    s = Scenario([half], {"m": (8, 1024, 2816)}, rates=HOST)
    s.run("m")
    assert s.where("m") == ["gpu0"]
