"""The inputs that the fuzzer kept, each a way through the code that no other takes: refused in our words, or read."""

from __future__ import annotations

from pathlib import Path

import pytest
from target import Target

CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())


@pytest.fixture(scope="module")
def target() -> Target:
    return Target()


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_no_input_does_more_than_being_refused(path: Path, target: Target) -> None:
    target.run(path.read_bytes())


def test_the_corpus_is_there() -> None:
    assert len(CORPUS) > 50
