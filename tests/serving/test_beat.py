"""What the engine promises before a decode follows from how long such decodes took."""

from __future__ import annotations

import pytest

from actors.serving.beat import FACTOR, FIRST, FIRST_S, FLOOR_S, Beat


class Engine:
    """Decodes that take as long as the test says, and what was promised for them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.said: list[tuple[float, float] | None] = []
        self.beat = Beat(lambda *said: self.said.append(said), lambda: self.said.append(None), clock=lambda: self.now)

    def decode(self, n_rows: int, took_s: float, what: str = "tokens") -> tuple[float, float]:
        """(allowed_s, slowest_s) of that decode."""
        with self.beat.computing(n_rows, what):
            self.now += took_s
        promised, rested = self.said[-2:]
        assert promised is not None and rested is None
        return promised


def test_the_first_of_a_kind_may_compile_kernels() -> None:
    engine = Engine()
    for _ in range(FIRST):
        assert engine.decode(1, 0.01)[0] == FIRST_S
    assert engine.decode(1, 0.01) == (FLOOR_S, 0.01)
    assert engine.decode(512, 0.01)[0] == FIRST_S, "another number of rows is another kind"
    assert engine.decode(1, 0.01, "embeddings")[0] == FIRST_S, "and so are other outputs"


def test_decodes_of_about_as_many_rows_are_of_a_kind() -> None:
    engine = Engine()
    for n_rows in (256, 400):
        engine.decode(n_rows, 3.0)
    assert engine.decode(511, 1.0) == (FACTOR * 3.0, 3.0)


def test_later_ones_may_take_many_times_the_slowest() -> None:
    engine = Engine()
    for took_s in (0.1, 5.0, 0.1):
        engine.decode(4, took_s)
    assert engine.decode(4, 0.1) == (FACTOR * 5.0, 5.0)


def test_a_very_slow_machine_gets_longer_for_a_prompt_from_the_start() -> None:
    engine = Engine()
    engine.decode(1, 2.0)
    assert engine.decode(512, 1.0)[0] == FACTOR * 2.0 * 512


def test_a_decode_that_fails_is_over_too() -> None:
    engine = Engine()
    with pytest.raises(RuntimeError), engine.beat.computing(1):
        raise RuntimeError
    assert engine.said[-1] is None
