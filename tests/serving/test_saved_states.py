"""Conversations that survive their model: states on disk, and engines that go on where another stopped."""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.serving import holdings, saved_states
from actors.serving.engine import Engine
from actors.serving.pieces import Medium
from actors.serving.protocol import Chunk, GenerateRequest, LoadSpec, Sampling, content_of
from actors.serving.saved_states import SavedStates, gain_s, origin_of
from actors.serving.states import Checkpoint, SavedState
from scheduler.units import MIB

SLOW = 100.0  # tokens/s: everything is worth keeping
TOKENS = [3 + index % 7 for index in range(200)]


def states(root: Path, origin: str = "one", most_bytes: int = MIB) -> SavedStates:
    return SavedStates(root, origin, most_bytes)


def save(into: SavedStates, tokens: list[int], content: bytes = b"state", checkpoints: Any = ()) -> bool:
    def write(memory: Any) -> bool:
        memory[:] = np.frombuffer(content, np.uint8)
        return True

    return into.save(tokens, checkpoints, len(content), write, SLOW)


def found(there: SavedStates, prompt: list[int], n_known: int = 0) -> SavedState | None:
    return there.find(prompt, n_known)


def files(root: Path) -> list[Path]:
    return sorted(root.glob("*/*"))


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    checkpoint = Checkpoint(150, np.arange(10, dtype=np.uint8))
    assert save(states(tmp_path), TOKENS, b"all of it", [checkpoint])
    back = found(states(tmp_path), [*TOKENS, 1, 2])
    assert back is not None
    assert (back.tokens, back.state.tobytes(), back.tokens_per_s) == (TOKENS, b"all of it", SLOW)
    ((n_tokens, state),) = back.checkpoints
    assert (n_tokens, state.tolist()) == (150, list(range(10)))


def test_a_copy_in_ram_makes_the_same_file(tmp_path: Path) -> None:
    there = states(tmp_path, most_bytes=5000)
    part = there.begin(TOKENS, [Checkpoint(150, np.arange(10, dtype=np.uint8))], 1000, SLOW, "", in_ram=True)
    assert part is not None and files(tmp_path) == []
    part.memory[:] = 7
    assert there.complete(part)
    (path,) = files(tmp_path)
    made = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and part.n_bytes == len(made)
    path.unlink()
    there = states(tmp_path)
    assert save(there, TOKENS, b"\7" * 1000, [Checkpoint(150, np.arange(10, dtype=np.uint8))])
    assert files(tmp_path)[0].read_bytes() == made
    part = there.begin([5, *TOKENS], [], 5000, SLOW, "ann", in_ram=True)
    assert part is not None and not states(tmp_path, most_bytes=5000).complete(part), (
        "its bytes count before it is there"
    )


def test_the_one_that_spares_most_is_taken(tmp_path: Path) -> None:
    there = states(tmp_path)
    other = [*TOKENS[:100], *[1] * 100]
    assert save(there, TOKENS, b"first")
    assert save(there, other, b"second")
    one = found(there, [*other, 5])
    assert one is not None
    assert one.state.tobytes() == b"second"
    assert found(there, [*other, 5], n_known=200) is None, "it is there already"
    assert found(there, [1, *TOKENS]) is None, "nothing begins so"


def test_a_longer_one_takes_the_place_of_its_beginning(tmp_path: Path) -> None:
    there = states(tmp_path)
    assert save(there, TOKENS)
    assert save(there, [*TOKENS, *TOKENS])
    assert len(files(tmp_path)) == 1
    assert not save(there, [*TOKENS, *TOKENS]), "it is there already"
    assert not save(there, TOKENS), "so is its beginning"


def test_states_of_another_origin_are_never_found(tmp_path: Path) -> None:
    assert save(states(tmp_path), TOKENS)
    assert found(states(tmp_path, "another"), TOKENS) is None


@pytest.mark.parametrize("where", [0, 9, 20, 40, 900, -1])
def test_a_damaged_file_is_dropped(tmp_path: Path, where: int) -> None:
    assert save(states(tmp_path), TOKENS, b"state" * 100)
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    there = states(tmp_path)
    assert found(there, TOKENS) is None
    assert found(there, TOKENS) is None
    assert save(there, TOKENS), "it is in nobody's way"


@pytest.mark.parametrize("left", [0, 10, 33, 500])
def test_a_cut_file_is_dropped(tmp_path: Path, left: int) -> None:
    assert save(states(tmp_path), TOKENS, b"state" * 100)
    (path,) = files(tmp_path)
    os.truncate(path, left)
    assert found(states(tmp_path), TOKENS) is None


def test_only_the_user_may_read_them(tmp_path: Path) -> None:
    root = tmp_path / "cache" / "states"
    assert save(states(root), TOKENS)
    (path,) = files(root)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_their_bytes_are_bounded_over_all_models(tmp_path: Path) -> None:
    content = b"x" * (MIB // 4)
    for number in range(6):
        assert save(states(tmp_path, f"model-{number}"), TOKENS, content)
        os.utime(files(tmp_path / f"../{tmp_path.name}")[-1], (number, number))
    there = files(tmp_path)
    assert sum(path.stat().st_size for path in there) <= MIB
    assert [path.parent.name for path in there] == ["model-3", "model-4", "model-5"]
    assert not save(states(tmp_path, "large"), TOKENS, b"x" * MIB)


def test_what_was_used_stays_longest(tmp_path: Path) -> None:
    content = b"x" * (MIB // 3)
    for number in range(2):
        assert save(states(tmp_path, f"model-{number}"), TOKENS, content)
        os.utime(files(tmp_path)[-1], (number, number))
    assert found(states(tmp_path, "model-0"), TOKENS) is not None
    assert save(states(tmp_path, "model-2"), TOKENS, content)
    assert [path.parent.name for path in files(tmp_path)] == ["model-0", "model-2"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    there = states(tmp_path)
    assert not there.save(TOKENS, [], 10, lambda memory: False, SLOW)
    assert files(tmp_path) == []


def test_a_disk_that_is_full_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert not save(states(tmp_path), TOKENS)
    assert files(tmp_path) == []


def test_incomplete_files_of_the_dead_are_removed(tmp_path: Path) -> None:
    left = tmp_path / "one" / "half.4711"
    left.parent.mkdir()
    left.write_bytes(b"x")
    os.utime(left, (1, 1))
    assert save(states(tmp_path), TOKENS)
    assert left not in files(tmp_path)


def test_what_is_read_sooner_than_saved_is_not_saved(tmp_path: Path) -> None:
    there = states(tmp_path)
    assert not there.save(TOKENS, [], MIB, lambda memory: True, 1e6)
    assert not there.save(TOKENS, [], 10, lambda memory: True, 0.0), "nobody knows how fast it is read"
    assert gain_s(4000, 1000.0, 1.0) == pytest.approx(3.0)


def test_the_origin_is_all_that_a_state_depends_on(tmp_path: Path, spec: Callable[..., LoadSpec]) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"content")
    base = spec(file)
    origins = [
        origin_of(base),
        origin_of(spec(file, type_k="q8_0")),
        origin_of(spec(file, type_v="q8_0")),
        origin_of(spec(file, flash_attn="off")),
        origin_of(spec(file, swa_full=True)),
        origin_of(spec(file, n_ctx=1024)),  # LongRoPE rotates keys by it
        origin_of(spec(file, n_seq_max=2)),
        origin_of(replace(base, mmproj=str(file))),
    ]
    file.write_bytes(b"contents")
    origins.append(origin_of(base))
    first, second = (tmp_path / f"split-0000{number}-of-00002.gguf" for number in (1, 2))
    for content in (b"content", b"new content"):
        first.write_bytes(b"the first part")
        os.utime(first, (1, 1))
        second.write_bytes(content)
        origins.append(origin_of(spec(first)))
    assert len(set(origins)) == len(origins)
    assert origin_of(base) == origin_of(spec(file, n_threads=1, n_ubatch=64))


# ---------------------------------------------------------------------- engines


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where states go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "arriero" / "states"


def prompt_of(n_tokens: int, first: int = 5) -> list[int]:
    return [first, *(10 + (7 * index) % 200 for index in range(n_tokens - 1))]


def ask(engine: Engine, prompt: list[int], max_tokens: int = 8) -> tuple[str, Chunk]:
    content = content_of(prompt=prompt)
    request = GenerateRequest(content, max_tokens=max_tokens, sampling=Sampling(temperature=0.0, ignore_eos=True))
    chunks = list(engine.generate(request))
    return "".join(chunk.text for chunk in chunks), chunks[-1]


@pytest.mark.llama
@pytest.mark.parametrize("kind", ["llama", "gemma3", "mamba"])
def test_a_conversation_goes_on_in_another_engine(
    cache: Path, sample: Callable[..., Path], spec: Callable[..., LoadSpec], kind: str
) -> None:
    wanted = replace(spec(sample(kind), n_seq_max=2), saved_state_bytes=64 * MIB)
    prompt = prompt_of(150)
    longer = [*prompt, *prompt_of(20, first=6)]
    with closing(Engine(replace(wanted, saved_state_bytes=0))) as engine:
        expected, _ = ask(engine, longer)
        assert engine.park() == 0
    with closing(Engine(wanted)) as engine:
        ask(engine, prompt)
        assert engine.park() == 1
    with closing(Engine(wanted)) as engine:
        text, last = ask(engine, longer)
    assert text == expected
    assert last.cached_tokens >= 150 - 4
    assert last.prompt_tokens == len(longer)


@pytest.mark.llama
def test_a_model_that_was_given_other_parameters_reads_anew(
    cache: Path, sample: Callable[..., Path], spec: Callable[..., LoadSpec]
) -> None:
    path = sample("llama")
    with closing(Engine(replace(spec(path), saved_state_bytes=64 * MIB))) as engine:
        ask(engine, prompt_of(150))
        assert engine.park() == 1
    with closing(Engine(replace(spec(path, type_k="q8_0"), saved_state_bytes=64 * MIB))) as engine:
        assert ask(engine, prompt_of(150))[1].cached_tokens == 0


@pytest.mark.llama
def test_a_state_that_llama_cpp_does_not_take_is_read_anew(
    cache: Path, sample: Callable[..., Path], spec: Callable[..., LoadSpec]
) -> None:
    """The checksum is right, and what is in it is not."""
    wanted = replace(spec(sample("llama")), saved_state_bytes=64 * MIB)
    prompt = prompt_of(150)
    with closing(Engine(replace(wanted, saved_state_bytes=0))) as engine:
        expected, _ = ask(engine, prompt)
    there = SavedStates(cache, origin_of(wanted), 64 * MIB)
    assert there.save(prompt, [], 1000, lambda memory: not memory.fill(255), SLOW)
    with closing(Engine(wanted)) as engine:
        text, last = ask(engine, prompt)
    assert (text, last.cached_tokens) == (expected, 0)
    assert files(cache) == [], "it would be tried again and again"


@pytest.mark.llama
def test_a_full_cache_makes_room_for_a_conversation(
    cache: Path, sample: Callable[..., Path], spec: Callable[..., LoadSpec]
) -> None:
    wanted = replace(spec(sample("llama"), n_seq_max=2, kv_unified=True), saved_state_bytes=64 * MIB)
    prompt = prompt_of(300)
    with closing(Engine(wanted)) as engine:
        first, _ = ask(engine, prompt)
        engine.park()
    with closing(Engine(wanted)) as engine:
        ask(engine, prompt_of(400, first=9))
        text, last = ask(engine, prompt)
    assert (text, last.cached_tokens) == (first, 299)


def test_tokens_of_any_kind_are_kept(tmp_path: Path) -> None:
    strange = array("i", [-(2**31), -1, 0, 2**31 - 1] * 50).tolist()
    there = states(tmp_path)
    assert save(there, strange)
    back = found(there, strange)
    assert back is not None
    assert back.tokens == strange


def test_a_folder_that_cannot_be_read_harms_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = states(tmp_path)
    assert save(there, TOKENS)

    def fails(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fails)
    assert found(there, TOKENS) is None
    assert found(states(tmp_path), TOKENS) is None
    monkeypatch.undo()
    assert found(states(tmp_path), TOKENS) is not None, "it is not deleted for it"


# ---------------------------------------------------------------------- whose they are


def save_of(source: str, into: SavedStates, tokens: list[int], n_bytes: int) -> bool:
    return into.save(tokens, [], n_bytes, lambda memory: not memory.fill(1), SLOW, source)


def numbered(number: int) -> list[int]:
    return [3 + number, *TOKENS]


def test_small_states_do_not_become_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_states, "MOST_FILES", 3)
    there = states(tmp_path, most_bytes=300_000)
    for number in range(6):
        assert save(there, numbered(number))
        for path in files(tmp_path):
            os.utime(path, (path.stat().st_mtime - 10,) * 2)
    assert len(files(tmp_path)) == 3
    kept = [number for number in range(6) if found(there, [*numbered(number), 5]) is not None]
    assert kept == [3, 4, 5]


def test_nobody_fills_the_disk_for_others(tmp_path: Path) -> None:
    there = states(tmp_path)
    made: dict[int, Path] = {}

    def save_one(source: str, number: int) -> None:
        before = set(files(tmp_path))
        assert save_of(source, there, numbered(number), MIB // 8)
        (made[number],) = set(files(tmp_path)) - before
        os.utime(made[number], (number, number))

    for number in range(2):
        save_one("bob", number)
    for number in range(10, 30):
        save_one("ann", number)
    left = [number for number, path in made.items() if path.exists()]
    assert left == [0, 1, 25, 26, 27, 28, 29], "bob's are older, and few"
    save_one("bob", 30)
    assert made[0].exists() and not made[25].exists(), "ann holds more"
    save_one("bob", 31)
    assert made[26].exists() and not made[0].exists(), "both hold as much: the oldest goes"


def test_whoever_holds_least_may_not_save_more_than_anybody_has(tmp_path: Path) -> None:
    there = states(tmp_path)
    for number in range(4):
        assert save_of("ann", there, numbered(number), MIB // 5)
    assert not save_of("bob", there, numbered(10), MIB - 4000)
    assert save_of("bob", there, numbered(10), MIB // 5)
    assert len(files(tmp_path)) == 4


def test_a_state_that_cannot_be_cut_serves_its_ends_only(tmp_path: Path) -> None:
    there = SavedStates(tmp_path, "one", MIB, can_cut=False)
    checkpoints = [Checkpoint(100, np.zeros(4, np.uint8)), Checkpoint(150, np.zeros(4, np.uint8))]
    assert save(there, TOKENS, b"state", checkpoints)
    assert found(there, [*TOKENS[:120], 1]) is not None
    assert found(there, [*TOKENS[:120], 1], n_known=100) is None
    assert found(there, [*TOKENS[:99], 1]) is None
    assert found(there, [*TOKENS, 1], n_known=199) is not None
    longer = [*TOKENS, *TOKENS]
    assert save(there, longer, b"longer")
    assert len(files(tmp_path)) == 2, "the longer one does not serve what begins with the shorter"


def test_pictures_come_back_as_they_were(tmp_path: Path) -> None:
    one, other = Medium(b"one", 5, 3, None), Medium(b"other", 4, 4, None)
    tokens = [*TOKENS, *one.tokens, *other.tokens, 5, *one.tokens, *TOKENS]
    there = states(tmp_path)
    assert save(there, tokens)
    back = found(there, [*tokens, 1])
    assert back is not None
    assert back.tokens == tokens


@pytest.mark.llama
def test_checkpoints_of_a_loaded_state_keep_to_the_slots_limit(
    cache: Path, sample: Callable[..., Path], spec: Callable[..., LoadSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = replace(spec(sample("mamba")), saved_state_bytes=64 * MIB)
    prompt = prompt_of(400)
    with closing(Engine(wanted)) as engine:
        for count in (100, 200, 300):
            ask(engine, prompt[:count], max_tokens=0)
        (slot,) = engine._batcher.slots()
        assert len(slot.checkpoints) == 3
        assert engine.park() == 1
    monkeypatch.setattr(holdings, "CHECKPOINTS_PER_SLOT", 2)
    with closing(Engine(wanted)) as engine:
        assert ask(engine, prompt[:303], max_tokens=0)[1].cached_tokens == 300
        (slot,) = engine._batcher.slots()
        assert len(slot.checkpoints) == 2
    monkeypatch.setattr(holdings, "MOST_CHECKPOINT_BYTES", 0)
    with closing(Engine(wanted)) as engine:
        ask(engine, prompt[:303], max_tokens=0)
        (slot,) = engine._batcher.slots()
        assert slot.checkpoints == []
