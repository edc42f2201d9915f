"""Sampler chains: how the next token is picked from the logits.

The chain is the one that llama.cpp's `common_sampler_init` makes (common/sampling.cpp), so that equal settings give
equal text: logit bias, the samplers in their order, then the seeded draw. As in llama-server, the samplers that look
back see the prompt, too. A seed makes the draw repeatable; without one llama.cpp takes a random seed. Samplers that
would do nothing are left out.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import llama_cpp

from actors.serving.protocol import Sampling
from scheduler.errors import Rejected

_RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "dynatemp_range": (0, 100),
    "dynatemp_exponent": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "typ_p": (0, 1),
    "top_n_sigma": (-1, 100),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1),
    "repeat_penalty": (0.01, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repeat_last_n": (-1, math.inf),
    "dry_multiplier": (0, 100),
    "dry_base": (0, 100),
    "dry_allowed_length": (0, 2**31 - 1),
    "dry_penalty_last_n": (-1, math.inf),
    "mirostat": (0, 2),
    "mirostat_tau": (0, 100),
    "mirostat_eta": (0, 1),
    "adaptive_target": (-1, 1),
    "adaptive_decay": (0, 0.99),
    "min_keep": (0, 2**31 - 1),
    "min_tokens": (0, math.inf),
}
_INFILL_CANDIDATES = 64
_MIROSTAT_M = 100  # as common_sampler_init has it
_DRY_BASE = 1.75  # instead of one below 1, as llama-server takes it
_KEEPS_THE_BEST = frozenset({"top_n_sigma", "top_k", "top_p", "min_p", "temperature"})
"""They change nothing where the likeliest token is picked afterwards."""


class Chain:
    """A sampler chain (`sampler`: the `llama_sampler *`). `close()` frees it."""

    def __init__(self) -> None:
        self.sampler: Any = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        self._keeps_going = False

    def add(self, sampler: Any) -> None:
        llama_cpp.llama_sampler_chain_add(self.sampler, sampler)

    def forbid_the_end(self, n_vocab: int, ends: Sequence[int]) -> None:
        """No token that ends the answer is picked, until `allow_the_end`. Comes before all that is added."""
        self.add(_biases(n_vocab, [(token, -math.inf) for token in ends]))
        self._keeps_going = True

    def allow_the_end(self) -> None:
        if self._keeps_going:
            self._keeps_going = False
            llama_cpp.llama_sampler_free(llama_cpp.llama_sampler_chain_remove(self.sampler, 0))

    def accept(self, tokens: Iterable[int]) -> None:
        """These came before what is sampled next."""
        for token in tokens:
            llama_cpp.llama_sampler_accept(self.sampler, token)

    def close(self) -> None:
        if self.sampler:
            llama_cpp.llama_sampler_free(self.sampler)
            self.sampler = None


def build_sampler(vocab: Any, n_ctx: int, sampling: Sampling, prompt: Sequence[int], ends: Sequence[int]) -> Chain:
    """A chain for one answer to `prompt`, in a slot of `n_ctx` tokens; `ends`: all tokens that end an answer.

    Raises Rejected for a setting out of range, or an unknown token in `logit_bias`.
    """
    _check(sampling)
    n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
    chain = Chain()
    try:
        if sampling.min_tokens:
            chain.forbid_the_end(n_vocab, ends)
        biases = [*_checked_biases(sampling.logit_bias or {}, n_vocab), *_suppressed(vocab)]
        if sampling.ignore_eos:
            biases += [(token, -math.inf) for token in ends]
        if biases:
            chain.add(_biases(n_vocab, biases))
        seed = llama_cpp.LLAMA_DEFAULT_SEED if sampling.seed is None else sampling.seed & 0xFFFFFFFF
        if sampling.mirostat:
            chain.add(llama_cpp.llama_sampler_init_temp(sampling.temperature))
            chain.add(_mirostat(sampling, n_vocab, seed))
        else:
            for sampler in _samplers(sampling, vocab, n_ctx, seed):
                chain.add(sampler)
            chain.accept(prompt[-_window(sampling, n_ctx) :] if _looks_back(sampling) else ())
    except BaseException:
        chain.close()
        raise
    return chain


def _samplers(sampling: Sampling, vocab: Any, n_ctx: int, seed: int) -> Iterable[Any]:
    """Those that do something, and at the end the one that picks."""
    keep, greedy = sampling.min_keep, sampling.temperature == 0
    n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
    made: Mapping[str, tuple[bool, Callable[[], Any]]] = {
        "penalties": (
            _penalises(sampling),
            lambda: llama_cpp.llama_sampler_init_penalties(
                n_vocab, _within(sampling.repeat_last_n, n_ctx), sampling.repeat_penalty,
                sampling.frequency_penalty, sampling.presence_penalty,
            ),
        ),
        "dry": (sampling.dry_multiplier > 0, lambda: _dry(sampling, vocab, n_ctx)),
        "top_n_sigma": (
            sampling.top_n_sigma > 0,
            lambda: llama_cpp.llama_sampler_init_top_n_sigma(sampling.top_n_sigma),
        ),
        "top_k": (sampling.top_k > 0, lambda: llama_cpp.llama_sampler_init_top_k(sampling.top_k)),
        "typ_p": (sampling.typ_p < 1, lambda: llama_cpp.llama_sampler_init_typical(sampling.typ_p, keep)),
        "top_p": (sampling.top_p < 1, lambda: llama_cpp.llama_sampler_init_top_p(sampling.top_p, keep)),
        "min_p": (sampling.min_p > 0, lambda: llama_cpp.llama_sampler_init_min_p(sampling.min_p, keep)),
        "xtc": (
            sampling.xtc_probability > 0,
            lambda: llama_cpp.llama_sampler_init_xtc(sampling.xtc_probability, sampling.xtc_threshold, keep, seed),
        ),
        "temperature": (
            True,
            lambda: llama_cpp.llama_sampler_init_temp_ext(
                sampling.temperature, sampling.dynatemp_range, sampling.dynatemp_exponent
            ),
        ),
        "infill": (True, lambda: _infill(vocab)),
    }  # fmt: skip
    active = [name for name in dict.fromkeys(sampling.samplers) if made.get(name, (False, None))[0]]
    while greedy and active and active[-1] in _KEEPS_THE_BEST:
        active.pop()
    for name in active:
        if name == "infill":  # it compares all candidates with each other
            yield llama_cpp.llama_sampler_init_top_k(_INFILL_CANDIDATES)
        yield made[name][1]()
    if greedy:
        yield llama_cpp.llama_sampler_init_greedy()
    elif "adaptive_p" in sampling.samplers:
        yield llama_cpp.llama_sampler_init_adaptive_p(sampling.adaptive_target, sampling.adaptive_decay, seed)
    else:
        yield llama_cpp.llama_sampler_init_dist(seed)


def _dry(sampling: Sampling, vocab: Any, n_ctx: int) -> Any:
    breakers = [breaker.encode() for breaker in sampling.dry_sequence_breakers]
    base = sampling.dry_base if sampling.dry_base >= 1 else _DRY_BASE
    return llama_cpp.llama_sampler_init_dry(
        vocab, sampling.dry_multiplier, base, sampling.dry_allowed_length,
        _within(sampling.dry_penalty_last_n, n_ctx), (ctypes.c_char_p * len(breakers))(*breakers), len(breakers),
    )  # fmt: skip


def _infill(vocab: Any) -> Any:
    if max(llama_cpp.llama_vocab_eot(vocab), llama_cpp.llama_vocab_eos(vocab)) < 0:  # llama.cpp would end the process
        raise Rejected("samplers: infill needs a model that can end a text, and this one has no token for it")
    return llama_cpp.llama_sampler_init_infill(vocab)


def _mirostat(sampling: Sampling, n_vocab: int, seed: int) -> Any:
    if sampling.mirostat == 1:
        return llama_cpp.llama_sampler_init_mirostat(
            n_vocab, seed, sampling.mirostat_tau, sampling.mirostat_eta, _MIROSTAT_M
        )
    return llama_cpp.llama_sampler_init_mirostat_v2(seed, sampling.mirostat_tau, sampling.mirostat_eta)


def _penalises(sampling: Sampling) -> bool:
    return sampling.repeat_penalty != 1 or bool(sampling.frequency_penalty or sampling.presence_penalty)


def _looks_back(sampling: Sampling) -> bool:
    return _penalises(sampling) or sampling.dry_multiplier > 0


def _window(sampling: Sampling, n_ctx: int) -> int:
    """How many tokens of the past matter, at least 1."""
    return max(1, _within(sampling.repeat_last_n, n_ctx), _within(sampling.dry_penalty_last_n, n_ctx))


def _within(n_tokens: int, n_ctx: int) -> int:
    """A window: llama.cpp takes memory for all of it."""
    return n_ctx if n_tokens < 0 else min(n_tokens, n_ctx)


def _check(sampling: Sampling) -> None:
    for name, (low, high) in _RANGES.items():
        if not low <= getattr(sampling, name) <= high:
            raise Rejected(f"{name} is {getattr(sampling, name)}; it must lie between {low:g} and {high:g}")


def _checked_biases(biases: Mapping[int, float], n_vocab: int) -> Iterable[tuple[int, float]]:
    for token in biases:
        if not 0 <= token < n_vocab:
            raise Rejected(f"logit_bias names token {token}; this model's tokens are 0 to {n_vocab - 1}")
    return biases.items()


def _suppressed(vocab: Any) -> Iterable[tuple[int, float]]:
    """Tokens that the file says are never to be said (tokenizer.ggml.suppress_tokens)."""
    count = ctypes.c_int32()
    tokens = llama_cpp.llama_vocab_get_suppress_tokens(vocab, ctypes.byref(count))
    return [(tokens[index], -math.inf) for index in range(count.value)] if tokens else ()


def _biases(n_vocab: int, biases: Sequence[tuple[int, float]]) -> Any:
    array = (llama_cpp.llama_logit_bias * len(biases))(*((token, bias) for token, bias in biases))
    return llama_cpp.llama_sampler_init_logit_bias(n_vocab, len(biases), array)
