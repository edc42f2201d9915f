"""Sampler chains: how the next token is picked from the logits.

The chain's order is the one llama-cpp-python uses, so that equal settings give equal text: penalties (over the last 64
generated tokens), then greedy, or top-k, top-p, min-p, temperature and the seeded draw. Logit bias comes first. A seed
makes the draw repeatable; without one llama.cpp takes a random seed. Samplers that would do nothing are left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import llama_cpp
from llama_cpp._internals import LlamaSampler

from actors.serving.protocol import Sampling
from scheduler.errors import Rejected

_PENALTY_WINDOW = 64  # tokens; llama-cpp-python's and llama.cpp's own default


def build_sampler(n_vocab: int, sampling: Sampling) -> LlamaSampler:
    """A chain for one answer; `close()` it afterwards.

    Raises Rejected for a setting out of range, or an unknown token in `logit_bias`.
    """
    _check_ranges(sampling)
    chain = LlamaSampler()
    try:
        if sampling.logit_bias:
            _check_bias(sampling.logit_bias, n_vocab)
            chain.add_logit_bias(n_vocab, dict(sampling.logit_bias))
        if sampling.repeat_penalty != 1 or sampling.frequency_penalty or sampling.presence_penalty:
            chain.add_penalties(
                n_vocab,
                _PENALTY_WINDOW,
                sampling.repeat_penalty,
                sampling.frequency_penalty,
                sampling.presence_penalty,
            )
        if sampling.temperature == 0:
            chain.add_greedy()
        else:
            if sampling.top_k > 0:
                chain.add_top_k(sampling.top_k)
            if sampling.top_p < 1:
                chain.add_top_p(sampling.top_p, 1)
            if sampling.min_p > 0:
                chain.add_min_p(sampling.min_p, 1)
            chain.add_temp(sampling.temperature)
            seed = llama_cpp.LLAMA_DEFAULT_SEED if sampling.seed is None else sampling.seed
            chain.add_dist(seed & 0xFFFFFFFF)
    except BaseException:
        chain.close()
        raise
    return chain


def _check_ranges(sampling: Sampling) -> None:
    for name, value, low, high in (
        ("temperature", sampling.temperature, 0.0, 100.0),
        ("top_p", sampling.top_p, 0.0, 1.0),
        ("min_p", sampling.min_p, 0.0, 1.0),
        ("repeat_penalty", sampling.repeat_penalty, 0.01, 100.0),
        ("presence_penalty", sampling.presence_penalty, -2.0, 2.0),
        ("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0),
    ):
        if not low <= value <= high:
            raise Rejected(f"{name} is {value}; it must lie between {low:g} and {high:g}")


def _check_bias(bias: Mapping[int, float], n_vocab: int) -> None:
    for token in bias:
        if not 0 <= token < n_vocab:
            raise Rejected(f"logit_bias names token {token}; this model's tokens are 0 to {n_vocab - 1}")
