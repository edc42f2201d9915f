"""Whether a few new tokens are read sooner together with known ones, by how long the model takes for them."""

from __future__ import annotations

from actors.serving.row_times import MANY, WORTH_S, Reading, RowTimes


def row_by_row(known: int, count: int) -> float:
    """As llama.cpp's attention on a CPU: six times as long for each of a few rows as for each of many."""
    return 0.0005 + (1 if count >= MANY else 6) * 6e-7 * known


def alike(known: int, count: int) -> float:
    """As on a GPU."""
    return 0.0005 + 6e-7 * known


def measured(row_s: object = row_by_row, answers_s: float = 0.003, known: int = 20_000) -> RowTimes:
    times = RowTimes()
    times.took([], answers_s)
    for count in (128, 35, 5, MANY):
        times.took([Reading(known, count)], answers_s + count * row_s(known, count))  # type: ignore[operator]
    return times


def test_a_few_tokens_are_read_with_known_ones_where_that_is_faster() -> None:
    times = measured()
    assert times.better_read_again(20_000, 40) == MANY - 40
    assert not times.better_read_again(20_000, 5), "five tokens take less time than 64"
    assert not times.better_read_again(20_000, MANY)
    assert not times.better_read_again(100, 40), "nothing is known of it"
    assert not measured(known=100).better_read_again(100, 40), "it spares no time worth a word"
    assert not measured(known=10).better_read_again(10, 40), "there are not so many"


def test_where_each_row_takes_its_time_nothing_is_read_again() -> None:
    times = measured(alike)
    assert not any(times.better_read_again(20_000, count) for count in range(1, MANY))


def test_what_the_answers_of_a_turn_take_is_not_the_rows() -> None:
    """Else five rows beside a slow answer would seem to be slow."""
    times = measured(alike, answers_s=2.0)
    assert not any(times.better_read_again(20_000, count) for count in range(1, MANY))
    assert measured(answers_s=2.0).better_read_again(20_000, 40)


def test_of_several_prompts_nobody_knows_which_took_the_time() -> None:
    times = measured()
    before = dict(times._row_s)
    times.took([Reading(0, 10), Reading(20_000, 10)], 5.0)
    assert times._row_s == before


def test_one_slow_turn_is_forgotten() -> None:
    times = measured(alike)
    times.took([Reading(20_000, 5)], 5 * WORTH_S)
    for _ in range(10):
        times.took([Reading(20_000, 5)], 0.003 + 5 * alike(20_000, 5))
    assert not times.better_read_again(20_000, 40)
