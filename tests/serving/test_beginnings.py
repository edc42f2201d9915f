"""Beginnings that several prompts share: saved before the last slot loses them, and found by those that come later."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_model import FakeModel, expected, heard, job, submitted
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.serving import beginnings, holdings, keeping
from actors.serving.batcher import Batcher
from actors.serving.beginnings import BLOCK, MOST_HASHES, Beginnings
from actors.serving.engine import Engine
from actors.serving.generation import Generation
from actors.serving.keeping import LEFT_BYTES, Keeper
from actors.serving.protocol import Chunk, GenerateRequest, LoadSpec, Sampling, content_of
from actors.serving.slot import Slot
from scheduler.units import MIB

SYSTEM = [1 + index % 9 for index in range(3 * BLOCK)]
OTHER = [9 - index % 7 for index in range(2 * BLOCK)]


class SlowKeeper(Keeper):
    """Everything is worth keeping: to read 100 tokens takes a second."""

    tokens_read_per_s = 100.0  # type: ignore[assignment]


@pytest.fixture
def keeper(tmp_path: Path, spec: Callable[..., LoadSpec]) -> Callable[..., Keeper]:
    """`keeper()`: of a model whose states lie in the test's folder."""
    (tmp_path / "model.gguf").write_bytes(b"content")

    def make(kind: type[Keeper] = SlowKeeper, can_cut: bool = True, most_bytes: int = 64 * MIB) -> Keeper:
        wanted = replace(spec(tmp_path / "model.gguf"), saved_state_bytes=most_bytes)
        return kind(wanted, can_cut=can_cut, root=tmp_path / "states")

    return make


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("states/*/*.state"))


class Replica:
    """A batcher over a fake model, whose prompts are looked for on the disk, as an engine does."""

    def __init__(self, model: FakeModel, keeper: Keeper) -> None:
        self.model, self.keeper = model, keeper
        self.batcher = Batcher(model, keeper=keeper)

    def begin(self, prompt: list[int], max_tokens: int = 3, **given: Any) -> Generation:
        one = job(prompt, max_tokens, **given)
        one.saved = self.keeper.find(prompt, self.batcher.known(prompt, ()), ())
        return submitted(self.batcher, one)

    def ask(self, prompt: list[int], **given: Any) -> int:
        """How much of the prompt was known; the answer is that of a clean run."""
        chunks = list(self.begin(prompt, **given).hearer)  # type: ignore[call-overload]
        assert heard(chunks) == expected(prompt, 3)
        self.keeper.close()
        known: int = chunks[-1].cached_tokens
        return known

    def close(self) -> None:
        self.batcher.close()
        self.keeper.close()
        assert not self.batcher.broken


@pytest.fixture
def serving() -> Iterator[Callable[..., Replica]]:
    replicas: list[Replica] = []

    def start(model: FakeModel, keeper: Keeper) -> Replica:
        replicas.append(Replica(model, keeper))
        return replicas[-1]

    yield start
    for replica in replicas:
        replica.close()


def test_what_two_prompts_began_with_is_shared() -> None:
    known = Beginnings()
    assert known.note([*SYSTEM, 1, 1], ()) == 0
    assert known.shared(SYSTEM, ()) == 0
    assert known.note([*SYSTEM, 2, 2], ()) == 3 * BLOCK
    assert known.shared([*SYSTEM, 3, 3], ()) == 3 * BLOCK
    assert known.shared(SYSTEM[:-1], ()) == 2 * BLOCK
    assert known.shared(SYSTEM, ((0, 1.0),)) == 0, "that was read with other adapters"
    assert known.note([5, *SYSTEM], ()) == 0
    assert known.note([], ()) == known.shared([], ()) == 0


def test_prompts_of_long_ago_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beginnings, "MOST_HASHES", 6)
    known = Beginnings()
    known.note(SYSTEM, ())
    known.note([7] * 2 * BLOCK, ())
    assert known.note(SYSTEM, ()) == 3 * BLOCK
    known.note(OTHER, ())
    known.note([8] * 2 * BLOCK, ())
    assert known.shared(SYSTEM, ()) == 2 * BLOCK, "the longest goes first"
    assert MOST_HASHES > 6


def test_a_shared_beginning_outlives_its_slot(
    tmp_path: Path, serving: Callable[..., Replica], keeper: Callable[..., Keeper]
) -> None:
    replica = serving(FakeModel(1, 32), keeper())
    replica.ask([*SYSTEM, 1, 1])
    replica.ask([*SYSTEM, 2, 2])
    assert files(tmp_path) == [], "the slot holds it"
    assert replica.ask(OTHER) == 0
    assert len(files(tmp_path)) == 1
    assert replica.ask([*SYSTEM, 3, 3]) == len(SYSTEM)
    replica.ask(OTHER)
    assert len(files(tmp_path)) == 1, "it was not written again"
    assert replica.ask([*SYSTEM, 4, 4]) == len(SYSTEM)
    assert len(files(tmp_path)) == 2, "the other one came twice"


def test_the_beginning_of_one_request_is_not_saved(
    tmp_path: Path, serving: Callable[..., Replica], keeper: Callable[..., Keeper]
) -> None:
    replica = serving(FakeModel(1, 32), keeper())
    replica.ask([*SYSTEM, 1, 1])
    replica.ask(OTHER)
    assert files(tmp_path) == []
    assert replica.ask([*SYSTEM, 2, 2]) == 0
    replica.ask(OTHER[:-1])
    assert len(files(tmp_path)) == 1, "it came again after its slot was lost"


def test_several_answers_to_one_prompt_share_nothing(
    tmp_path: Path, serving: Callable[..., Replica], keeper: Callable[..., Keeper]
) -> None:
    replica = serving(FakeModel(1, 32), keeper())
    first = replica.begin([*SYSTEM, 1])
    replica.ask([*SYSTEM, 1], first=first)
    replica.ask(OTHER)
    assert files(tmp_path) == []


def test_what_another_slot_holds_is_not_saved(
    tmp_path: Path, serving: Callable[..., Replica], keeper: Callable[..., Keeper]
) -> None:
    model = FakeModel(2, 32)
    model.pause = threading.Event()
    replica = serving(model, keeper())
    both = [replica.begin([*SYSTEM, last]) for last in (1, 2)]
    assert model.entered.wait(10)
    model.pause.set()
    for one in both:
        list(one.hearer)  # type: ignore[call-overload]
    replica.ask(OTHER)
    assert files(tmp_path) == []
    replica.ask([8] * 2 * BLOCK)
    assert len(files(tmp_path)) == 1


def test_a_full_cache_saves_what_it_forgets(
    tmp_path: Path, serving: Callable[..., Replica], keeper: Callable[..., Keeper]
) -> None:
    model = FakeModel(3, 32, room=400)
    replica = serving(model, keeper())
    replica.ask([*SYSTEM, 1])
    replica.ask([*SYSTEM, 2])
    replica.ask([7] * 300)
    assert len(files(tmp_path)) == 1
    assert replica.ask([*SYSTEM, 3]) == len(SYSTEM)


def test_nobody_waits_long_for_a_copy(
    tmp_path: Path, serving: Callable[..., Replica], keeper: Callable[..., Keeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "MOST_COPY_S", 0.0)
    model = FakeModel(2, 32)
    replica = serving(model, keeper())
    replica.ask([*SYSTEM, 1])
    replica.ask([*SYSTEM, 2])
    model.ends_generation = lambda token: False  # type: ignore[method-assign]
    model.entered.clear()
    model.pause = threading.Event()
    long = replica.begin([6] * 5, 500)
    assert model.entered.wait(10)
    other = replica.begin(OTHER)
    model.pause.set()
    list(other.hearer)  # type: ignore[call-overload]
    assert files(tmp_path) == []
    replica.batcher.cancel(long)


def test_copies_take_a_tenth_of_the_time_of_others(keeper: Callable[..., Keeper]) -> None:
    one = keeper()

    def slow(memory: Any) -> bool:
        time.sleep(0.05)
        return True

    assert one.would_keep(SYSTEM, (), 1000, others_run=True)
    one.keep(Slot(0, [*SYSTEM]), 1000, slow, lambda adapters: None)
    one.close()
    assert not one.would_keep(OTHER, (), 1000, others_run=True)
    assert one.would_keep(OTHER, (), 1000, others_run=False)


def test_loads_of_one_source_take_a_tenth_of_the_time_of_others(
    keeper: Callable[..., Keeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, now = keeper(Keeper), [100.0]
    monkeypatch.setattr(keeping.time, "perf_counter", lambda: now[0])

    def slow() -> bool:
        now[0] += 0.2
        return True

    for _ in range(2):
        assert one.may_load("ann", 10 * MIB)
        one.load(slow, "ann", 10 * MIB, others_run=True)
    assert not one.may_load("ann", 10 * MIB), "0.2 s more would be 0.6 s"
    assert one.may_load("ann", 5 * MIB) and one.may_load("ben", 10 * MIB)
    assert not one.may_load("ben", 30 * MIB), "it takes 0.6 s, as was measured"
    now[0] += 0.15
    assert not one.may_load("ann", 10 * MIB), "short loads take half of the time"
    now[0] += 0.1
    assert one.may_load("ann", 10 * MIB), "reading would take longer than this load"
    assert not one.may_load("ann", 15 * MIB), "0.3 s: it is not short"
    now[0] += 10.0
    assert one.may_load("ann", 15 * MIB)
    one.load(slow, "ben", 10 * MIB, others_run=True)
    one.load(slow, "cat", 10 * MIB, others_run=False)
    assert list(one._loads_paid_s) == ["ben"]


def test_a_prompt_is_read_where_others_would_wait_long_for_its_state(
    serving: Callable[..., Replica], keeper: Callable[..., Keeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FakeModel(2, 64)
    replica = serving(model, keeper())
    replica.ask([*SYSTEM, 1])
    replica.ask([*SYSTEM, 2])
    replica.ask(OTHER)
    replica.ask([6] * len(SYSTEM))
    replica.keeper.close()
    monkeypatch.setattr(keeping, "MOST_LOADS_S", 0.0)
    monkeypatch.setattr(keeping, "SHORT_LOAD_S", -1.0)
    model.entered.clear()
    model.pause = threading.Event()
    running = replica.begin([7] * 5, 40)
    assert model.entered.wait(10)
    reading = replica.begin([*SYSTEM, 3])
    model.pause.set()
    for each in (running, reading):
        chunks: list[Chunk] = list(each.hearer)  # type: ignore[call-overload]
    assert heard(chunks) == expected([*SYSTEM, 3], 3) and chunks[-1].cached_tokens == 0
    assert replica.ask([*SYSTEM, 4]) == len(SYSTEM)


def test_whoever_waits_gets_what_was_saved_meanwhile(
    serving: Callable[..., Replica], keeper: Callable[..., Keeper]
) -> None:
    """It was asked for while a slot still held its beginning."""
    model = FakeModel(1, 32)
    replica = serving(model, keeper())
    replica.ask([*SYSTEM, 1])
    replica.ask([*SYSTEM, 2])
    model.entered.clear()
    model.pause = threading.Event()
    running = replica.begin(OTHER)
    assert model.entered.wait(10)
    replica.keeper.close()
    waiting = job([*SYSTEM, 3], 3)
    submitted(replica.batcher, waiting)
    replica.batcher._slots._offer(())
    assert waiting.saved is not None and len(waiting.saved.tokens) == len(SYSTEM)
    model.pause.set()
    list(running.hearer)  # type: ignore[call-overload]
    chunks: list[Chunk] = list(waiting.hearer)  # type: ignore[call-overload]
    assert heard(chunks) == expected([*SYSTEM, 3], 3) and chunks[-1].cached_tokens == len(SYSTEM)


def test_a_memory_that_cannot_be_cut_has_a_checkpoint_where_prompts_part(
    tmp_path: Path, serving: Callable[..., Replica], keeper: Callable[..., Keeper]
) -> None:
    replica = serving(FakeModel(1, 32, can_cut=False), keeper(can_cut=False))
    tail = [5] * 2 * BLOCK
    replica.ask([*SYSTEM, 1, *tail])
    assert replica.ask([*SYSTEM, 2, *tail]) == 0
    assert replica.ask([*SYSTEM, 3, *tail]) == len(SYSTEM), "the second one made a checkpoint"
    replica.ask(OTHER)
    assert len(files(tmp_path)) == 1
    assert replica.ask([*SYSTEM, 4, *tail]) == len(SYSTEM)


def test_no_copy_is_made_where_memory_is_short(keeper: Callable[..., Keeper], monkeypatch: pytest.MonkeyPatch) -> None:
    one = keeper()
    monkeypatch.setattr(keeping, "memory_available_bytes", lambda: LEFT_BYTES + 999)
    assert not one.would_keep(SYSTEM, (), 1000, others_run=False)
    assert one.would_keep(SYSTEM, (), 999, others_run=False)


def test_what_is_read_soon_is_not_saved(
    tmp_path: Path, serving: Callable[..., Replica], keeper: Callable[..., Keeper]
) -> None:
    class Quick(Keeper):
        tokens_read_per_s = 1e9  # type: ignore[assignment]

    replica = serving(FakeModel(1, 32), keeper(Quick))
    for prompt in ([*SYSTEM, 1], [*SYSTEM, 2], OTHER):
        replica.ask(prompt)
    assert files(tmp_path) == []


@settings(max_examples=80, deadline=None)
@given(
    turns=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(1, 4)), min_size=1, max_size=10),
    n_slots=st.integers(1, 3),
    room=st.sampled_from([100, 10_000]),
    can_cut=st.booleans(),
    shares=st.booleans(),
)
@pytest.mark.slow
def test_every_answer_is_that_of_a_clean_run(
    tmp_path_factory: pytest.TempPathFactory,
    spec: Callable[..., LoadSpec],
    turns: list[tuple[int, int, int]],
    n_slots: int,
    room: int,
    can_cut: bool,
    shares: bool,
) -> None:
    """The fake says when a sequence does not hold what belongs to it."""
    folder = tmp_path_factory.mktemp("states")
    (folder / "model.gguf").write_bytes(b"content")
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (beginnings, "BLOCK", 4),
            (holdings, "LEAST_SHARED", 1),
            (holdings, "LEAST_BETWEEN", 4),
        ):
            patch.setattr(module, name, value)
        model = FakeModel(n_slots, 8, can_cut, room)
        model.shares_cells = shares and can_cut
        wanted = replace(spec(folder / "model.gguf"), saved_state_bytes=MIB)
        replica = Replica(model, SlowKeeper(wanted, can_cut=can_cut, root=folder))
        jobs = []
        for which, shared, more in turns:
            prompt = [*([which + 1] * shared), *([which + 2] * more)]
            jobs.append((prompt, replica.begin(prompt)))
            if more > 2:  # one after the other
                assert heard(list(jobs.pop()[1].hearer)) == expected(prompt, 3)  # type: ignore[call-overload]
        for prompt, one in jobs:
            assert heard(list(one.hearer)) == expected(prompt, 3)  # type: ignore[call-overload]
        replica.close()


# ---------------------------------------------------------------------- engines


@pytest.mark.llama
@pytest.mark.parametrize("kind", ["llama", "gemma3", "mamba"])
def test_a_system_prompt_outlives_its_slot(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sample: Callable[..., Path],
    spec: Callable[..., LoadSpec],
    kind: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Keeper, "tokens_read_per_s", 100.0)
    wanted = replace(spec(sample(kind), n_ctx=1024), saved_state_bytes=64 * MIB)
    system = [5, *(10 + (7 * index) % 200 for index in range(3 * BLOCK - 1))]
    tail = [11 + index % 50 for index in range(2 * BLOCK)]

    def ask(engine: Engine, prompt: list[int]) -> tuple[str, int]:
        sampling = Sampling(temperature=0.0, ignore_eos=True)
        chunks = list(engine.generate(GenerateRequest(content_of(prompt=prompt), max_tokens=8, sampling=sampling)))
        return "".join(chunk.text for chunk in chunks), chunks[-1].cached_tokens

    with closing(Engine(replace(wanted, saved_state_bytes=0))) as engine:
        expected_text, _ = ask(engine, [*system, 9, *tail])
    with closing(Engine(wanted)) as engine:
        for last in (6, 7, 8):
            ask(engine, [*system, last, *tail])
        assert ask(engine, tail[::-1])[1] == 0
        assert engine._keeper is not None
        engine._keeper.close()
        assert ask(engine, [*system, 9, *tail]) == (expected_text, len(system))
