"""Hostile bodies: each is answered, or refused in the shape of all errors with a status that the document knows."""

from __future__ import annotations

import json
import random

import pytest
from hostile_requests import VALID, FakeBackend, answered, check, hostile, make_app
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.gateway.limits import INLINE_BYTES

APP = make_app(FakeBackend())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
@pytest.mark.slow
def test_no_body_gets_more_than_a_refusal(seed: int) -> None:
    path, body = hostile(random.Random(seed), INLINE_BYTES)
    if len(body) <= INLINE_BYTES:  # the others would need processes, one per test
        check(APP, path, *answered(APP, path, body))


@pytest.mark.parametrize("path", VALID)
def test_what_the_harm_is_put_into_is_answered(path: str) -> None:
    """Otherwise every body would be refused for the same reason."""
    status, _ = answered(APP, path, json.dumps(VALID[path]).encode())
    assert status == 200
