"""Sampler chains: every setting of llama.cpp's, in its order, and none that ends the process."""

from __future__ import annotations

import ctypes
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.gateway.sampler_settings import SamplerSettings
from actors.serving.protocol import SAMPLERS, Sampling
from actors.serving.vocabulary import Vocabulary
from scheduler.errors import Rejected

pytestmark = pytest.mark.llama

N_CTX = 256


@pytest.fixture(scope="module")
def words(sample: Callable[..., Path]) -> Vocabulary:
    return Vocabulary(str(sample("llama")))


def picks(
    words: Vocabulary, sampling: Sampling, logits: dict[int, float], count: int = 1, prompt: Sequence[int] = ()
) -> list[int]:
    """What a chain picks, `count` times, of tokens with these logits."""
    import llama_cpp

    from actors.serving.sampling import build_sampler

    chain = build_sampler(words.pointer, N_CTX, sampling, prompt, ends=[2])
    picked = []
    for _ in range(count):
        data = (llama_cpp.llama_token_data * len(logits))(*((token, logit, 0.0) for token, logit in logits.items()))
        array = llama_cpp.llama_token_data_array(data=data, size=len(logits), selected=-1, sorted=False)
        llama_cpp.llama_sampler_apply(chain.sampler, ctypes.byref(array))
        assert 0 <= array.selected < array.size
        picked.append(int(array.data[array.selected].id))
        chain.accept(picked[-1:])
        if len(picked) == sampling.min_tokens:
            chain.allow_the_end()
    chain.close()
    chain.close()
    return picked


EVEN = dict.fromkeys(range(10, 20), 0.0)
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0, "seed": 7}


@pytest.mark.parametrize(
    ("given", "logits", "possible"),
    [
        ({"top_k": 1}, {10: 1.0, 11: 2.0}, {11}),
        ({"top_p": 0.5}, {10: 5.0, 11: 1.0, 12: 1.0}, {10}),
        ({"min_p": 0.9}, {10: 5.0, 11: 1.0}, {10}),
        ({"typ_p": 0.1}, {10: 3.0, 11: 2.9, 12: -9.0}, {10}),
        ({"top_n_sigma": 0.5}, {10: 9.0, 11: 0.0, 12: 0.0}, {10}),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.2}, {10: 1.0, 11: 0.9}, {11}),
        ({"logit_bias": {10: -100.0}}, {10: 3.0, 11: 0.0}, {11}),
        ({"ignore_eos": True}, {2: 50.0, 11: 0.0}, {11}),
        ({"min_tokens": 20}, {2: 50.0, 11: 0.0}, {11}),
        ({"temperature": 0.0, "top_k": 40}, {10: 1.0, 11: 1.1}, {11}),
        ({"temperature": 0.0, "mirostat": 1}, {10: 1.0, 11: 9.0}, {11}),
        ({"mirostat": 2, "mirostat_tau": 0.01, "mirostat_eta": 0.9}, {10: 9.0, 11: 1.0}, {10}),
        ({"samplers": ("temperature",), "top_k": 1}, {10: 1.0, 11: 1.0}, {10, 11}),
        ({"samplers": ("infill",)}, {10: 9.0, 11: -9.0}, {10}),
    ],
)
def test_each_setting_does_what_it_says(
    words: Vocabulary, given: dict[str, Any], logits: dict[int, float], possible: set[int]
) -> None:
    assert set(picks(words, Sampling(**{**OFF, **given}), logits, 20)) == possible


def test_the_end_is_allowed_after_min_tokens(words: Vocabulary) -> None:
    assert picks(words, Sampling(**OFF, min_tokens=3), {2: 50.0, 11: 0.0}, 5) == [11, 11, 11, 2, 2]


def test_penalties_and_dry_see_the_prompt(words: Vocabulary) -> None:
    """As in llama-server."""
    logits = {10: 1.0, 11: 0.9}
    greedy = {"temperature": 0.0}
    assert picks(words, Sampling(**greedy), logits, prompt=[10]) == [10]
    assert picks(words, Sampling(**greedy, repeat_penalty=2.0), logits, prompt=[10]) == [11]
    assert picks(words, Sampling(**greedy, repeat_penalty=2.0, repeat_last_n=1), logits, prompt=[10, 50]) == [10]
    assert picks(words, Sampling(**greedy, repeat_penalty=2.0, repeat_last_n=-1), logits, prompt=[10, 50]) == [11]
    again = [10, 20, 21, 22, 10, 20, 21, 22]
    dry = Sampling(**greedy, dry_multiplier=5.0, dry_sequence_breakers=())
    assert picks(words, dry, logits, prompt=again) == [11]


def test_without_a_temperature_a_sampler_sees_what_those_before_it_left(words: Vocabulary) -> None:
    """As in llama.cpp: what seems to be of no use to the likeliest token is, to those that come after it."""
    logits = {10: 1.0, 11: 0.9, 12: 0.8}
    certain = Sampling(temperature=0.0, top_k=1, xtc_probability=1.0, xtc_threshold=0.1)
    assert picks(words, certain, logits) == [10]
    assert picks(words, replace(certain, top_k=0), logits) == [12]
    order = ("top_k", "penalties", "temperature")
    punished = Sampling(temperature=0.0, samplers=order, top_k=1, repeat_penalty=2.0)
    assert picks(words, punished, logits, prompt=[10]) == [10]
    assert picks(words, replace(punished, samplers=order[1:]), logits, prompt=[10]) == [11]


def test_infill_does_not_compare_a_whole_vocabulary_with_itself(words: Vocabulary) -> None:
    """That would be a hundred billion steps; also where nothing else cuts the candidates down."""
    every = dict.fromkeys(range(400), 0.0)
    for greedy in (0.0, 1.0):
        wanted = Sampling(samplers=("infill",) * 16, ignore_eos=True, temperature=greedy, seed=1)
        assert set(picks(words, wanted, every, 3)) <= every.keys()


def test_equal_seeds_draw_alike(words: Vocabulary) -> None:
    drawn = [picks(words, Sampling(**{**OFF, "seed": seed}), EVEN, 30) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(Counter(drawn[0])) > 3


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"temperature": math.nan}, "temperature"),
        ({"dynatemp_range": -1.0}, "dynatemp_range"),
        ({"adaptive_decay": 1.0}, "adaptive_decay"),
        ({"dry_penalty_last_n": -2}, "dry_penalty_last_n"),
        ({"logit_bias": {10**9: 1.0}}, "logit_bias"),
    ],
)
def test_what_cannot_be_is_refused(words: Vocabulary, given: dict[str, Any], named: str) -> None:
    with pytest.raises(Rejected, match=named):
        picks(words, Sampling(**given), EVEN)


NUMBER = st.floats(0, 1)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0, 0.01, 1, 100]),
        "dynatemp_range": st.sampled_from([0, 0.5, 100]),
        "dynatemp_exponent": st.sampled_from([0, 0.001, 100]),
        "top_p": NUMBER,
        "top_k": st.integers(-1, 2**31 - 1),
        "min_p": NUMBER,
        "typical_p": NUMBER,
        "top_n_sigma": st.floats(-1, 100),
        "xtc_probability": NUMBER,
        "xtc_threshold": NUMBER,
        "repeat_penalty": st.floats(0.01, 10),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repeat_last_n": st.sampled_from([-1, 0, 1, 2**31 - 1]),
        "dry_multiplier": st.floats(0, 100),
        "dry_base": st.floats(0, 100),
        "dry_allowed_length": st.sampled_from([0, 1, 2**31 - 1]),
        "dry_penalty_last_n": st.sampled_from([-1, 0, 1, 2**31 - 1]),
        "dry_sequence_breakers": st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=3),
        "mirostat": st.sampled_from([0, 1, 2]),
        "mirostat_tau": st.floats(0, 100),
        "mirostat_eta": NUMBER,
        "adaptive_target": st.floats(-1, 1),
        "adaptive_decay": st.floats(0, 0.99),
        "min_keep": st.sampled_from([0, 1, 2**31 - 1]),
        "samplers": st.lists(st.sampled_from([*SAMPLERS, "adaptive_p", "infill"]), max_size=12),
        "ignore_eos": st.booleans(),
        "min_tokens": st.integers(0, 3),
        "seed": st.integers(0, 2**40),
    },
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=SETTINGS, logits=st.lists(st.floats(-1000, 1000, width=32), min_size=2, max_size=40))
def test_nothing_that_a_client_may_send_breaks_a_chain(
    words: Vocabulary, wanted: dict[str, Any], logits: list[float]
) -> None:
    """What it picks is one of the tokens; a failed assertion of llama.cpp's would end this process."""
    sampling = SamplerSettings(**wanted).sampling(randomly=False)
    given = dict(enumerate(logits, start=2))
    assert set(picks(words, sampling, given, 5, prompt=[10, 11, 10, 11])) <= given.keys()
