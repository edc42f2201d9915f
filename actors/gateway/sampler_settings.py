"""How tokens are chosen: llama.cpp's sampler settings, as clients of all three APIs send them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field

from actors.records import MAX_TOKENS
from actors.serving.protocol import SAMPLERS, Sampling

MAX_BIASES = 1024  # OpenAI takes 300
MAX_BIASED_TEXT = 64  # characters: each of its tokens is biased, and looked for at every token
MAX_BREAKERS = 8  # each makes a table of all tokens with it
MAX_BREAKER_LENGTH = 40  # llama.cpp cuts them there
MAX_SAMPLERS = 16
_LETTERS: Mapping[str, str] = {
    "d": "dry", "k": "top_k", "y": "typ_p", "p": "top_p", "s": "top_n_sigma", "m": "min_p", "t": "temperature",
    "x": "xtc", "i": "infill", "e": "penalties", "a": "adaptive_p",
}  # fmt: skip
"""Of samplers in short, common_sampler_type_to_chr (common/sampling.cpp)."""

_NAMES = {name.replace("_", ""): name for name in (*SAMPLERS, "infill", "adaptive_p")} | {
    "nucleus": "top_p", "temp": "temperature", "typ": "typ_p", "typicalp": "typ_p",
}  # fmt: skip


def _names(given: object) -> object:
    """Samplers by their names, in any of llama.cpp's spellings, or as a string of their letters."""
    if isinstance(given, str):
        given = [_LETTERS.get(letter, letter) for letter in given[: MAX_SAMPLERS + 1]]
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        return given
    if len(given) > MAX_SAMPLERS:
        raise ValueError(f"{len(given)} samplers; at most {MAX_SAMPLERS} are allowed")
    names = [_NAMES.get(name[:32].lower().replace("-", "").replace("_", "")) for name in given]
    if None in names:
        raise ValueError(f"an unknown sampler; known samplers: {', '.join(_LETTERS.values())}")
    return names


def _pairs(given: object) -> object:
    """Biases as pairs, whichever of two spellings was used: an object, or a list of pairs. `false` forbids a token."""
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, list):
        return given
    if len(pairs) > MAX_BIASES:
        raise ValueError(f"{len(pairs)} tokens; at most {MAX_BIASES} are allowed")
    return [_pair(pair) for pair in pairs]


def _pair(given: object) -> object:
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise ValueError("a bias is a pair of a token (or a text) and a number")
    key, bias = given
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10:
        key = int(key)
    if isinstance(key, int) and not 0 <= key < 2**31:
        raise ValueError("a token is a number, 0 or more")
    if isinstance(key, str) and not 0 < len(key) <= MAX_BIASED_TEXT:
        raise ValueError(f"a text has 1 to {MAX_BIASED_TEXT} characters")
    return key, -100.0 if bias is False else bias


Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[list[tuple[int | str, Bias]], Field(fail_fast=True), BeforeValidator(_pairs)]
Breakers = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_BREAKER_LENGTH)]],
    Field(min_length=1, max_length=MAX_BREAKERS, fail_fast=True),
]


class SamplerSettings(BaseModel):
    """With llama.cpp's names. What is left out has the defaults of `Sampling`."""

    temperature: float | None = Field(default=None, ge=0, le=100)
    dynatemp_range: float | None = Field(default=None, ge=0, le=100)
    dynatemp_exponent: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=MAX_TOKENS)
    min_p: float | None = Field(default=None, ge=0, le=1)
    typ_p: float | None = Field(default=None, ge=0, le=1, validation_alias=AliasChoices("typ_p", "typical_p"))
    top_n_sigma: float | None = Field(default=None, ge=-1, le=100)
    xtc_probability: float | None = Field(default=None, ge=0, le=1)
    xtc_threshold: float | None = Field(default=None, ge=0, le=1)
    repeat_penalty: float | None = Field(default=None, gt=0, le=10)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repeat_last_n: int | None = Field(default=None, ge=-1, le=MAX_TOKENS)
    dry_multiplier: float | None = Field(default=None, ge=0, le=100)
    dry_base: float | None = Field(default=None, ge=0, le=100)
    dry_allowed_length: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    dry_penalty_last_n: int | None = Field(default=None, ge=-1, le=MAX_TOKENS)
    dry_sequence_breakers: Breakers | None = None
    mirostat: Literal[0, 1, 2] | None = None
    mirostat_tau: float | None = Field(default=None, ge=0, le=100)
    mirostat_eta: float | None = Field(default=None, ge=0, le=1)
    adaptive_target: float | None = Field(default=None, ge=-1, le=1)
    adaptive_decay: float | None = Field(default=None, ge=0, le=0.99)
    min_keep: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    samplers: Annotated[list[str], BeforeValidator(_names)] | None = None
    logit_bias: Biases | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    seed: int | None = None

    def sampling(self, *, randomly: bool) -> Sampling:
        """`randomly`: whether the seed means that there is none. llama.cpp's seeds have 32 bits."""
        given: dict[str, Any] = {
            setting.name: value for setting in fields(Sampling) if (value := getattr(self, setting.name)) is not None
        }
        for name in ("samplers", "dry_sequence_breakers"):
            if name in given:
                given[name] = tuple(given[name])
        given["seed"] = None if self.seed is None or randomly else self.seed & 0xFFFFFFFF
        if self.logit_bias is not None:
            given["logit_bias"] = {token: bias for token, bias in self.logit_bias if isinstance(token, int)}
        return Sampling(**given)

    def biased_texts(self) -> dict[str, float] | None:
        """The biases of what is no token's number: only the preparer knows its tokens."""
        return {text: bias for text, bias in self.logit_bias or () if isinstance(text, str)} or None
