"""Requests that are taken for the same, when one of them has ended a runner."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from actors.gateway.hashes import fingerprint_of
from actors.serving.protocol import EmbedRequest, GenerateRequest, ReplyForm, Sampling

GENERATES = GenerateRequest(b"{}", reply=ReplyForm("chat"))
EMBEDS = EmbedRequest(b"{}")
OTHERS: dict[str, Any] = {
    "content": b"{1}",
    "max_tokens": 7,
    "stop": ("x",),
    "sampling": Sampling(temperature=0.5),
    "reply": ReplyForm("chat", stream=True),
    "n": 2,
    "n_probs": 3,
    "echo": True,
    "lora": ((0, 0.5),),
    "dimensions": 5,
    "rerank": True,
}
SAME: dict[str, Any] = {"lease_id": "another", "source": "bob"}


@pytest.mark.parametrize("request_", [GENERATES, EMBEDS], ids=["generate", "embed"])
def test_every_field_counts_but_who_asks(request_: Any) -> None:
    for each in fields(request_):
        if each.name in SAME:
            same = replace(request_, **{each.name: SAME[each.name]})
            assert fingerprint_of("m", same) == fingerprint_of("m", request_)
        else:
            other = replace(request_, **{each.name: OTHERS[each.name]})
            assert fingerprint_of("m", other) != fingerprint_of("m", request_), each.name


def test_what_an_answer_is_named_does_not_count() -> None:
    again = replace(GENERATES, reply=ReplyForm("chat", request_id="2", created=5, settings='{"user": 1}'))
    assert fingerprint_of("m", again) == fingerprint_of("m", GENERATES)


def test_models_and_kinds_of_requests_are_told_apart() -> None:
    assert fingerprint_of("m", GENERATES) != fingerprint_of("n", GENERATES)
    assert fingerprint_of("m", EMBEDS) != fingerprint_of("m", GENERATES)
