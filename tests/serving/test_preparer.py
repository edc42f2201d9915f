"""The preparer: what a stranger writes is opened beside the runner, within limits, and takes only itself down."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import psutil
import pytest
from patience import wait_until

from actors import frames
from actors.serving import child_memory, preparation
from actors.serving.conversation import Constraint, Parsing
from actors.serving.dialogue import HELD, Kind
from actors.serving.engine import Engine
from actors.serving.grammar import WORD, Grammar
from actors.serving.preparation import Errand, Preparer
from actors.serving.protocol import Delta, GenerateRequest, content_of
from actors.serving.vocabulary import Vocabulary
from scheduler.errors import EngineFailed, Rejected, Unavailable
from scheduler.units import MIB

pytestmark = pytest.mark.llama

N_CTX = 512
GROWING = "{% set a = namespace(x='xxxx') %}{% for i in range(99) %}{% set a.x = a.x ~ a.x %}{% endfor %}{{ a.x }}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
EXPONENTIAL = {"type": "string", "pattern": "^x" + "(" * 24 + "a?" + "){2}" * 24 + "$"}
CHAT = content_of(messages=[{"role": "user", "content": "hello"}])


@pytest.fixture(scope="module")
def preparer(sample: Callable[..., Path]) -> Iterator[Preparer]:
    with closing(started(sample("llama"))) as preparer:
        yield preparer


@pytest.fixture(scope="module")
def words(sample: Callable[..., Path]) -> Vocabulary:
    return Vocabulary(str(sample("llama")))


def schema(of: object) -> bytes:
    return content_of(prompt="Say it:", json_schema=of)


def with_template(path: Path, template: str, to: Path) -> Preparer:
    """A preparer for the model with another chat template."""
    source = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(to, "llama")
    for name, each in source.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "tokenizer.chat_template"):
            element = each.types[-1] if each.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, each.contents(), each.types[0], element)
    writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return started(to)


def started(path: Path) -> Preparer:
    preparer = Preparer()
    preparer.read(str(path))
    return preparer


def limit_preparers(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """Preparers that start from now on have another limit."""

    def start(command: list[str], **settings: Any) -> subprocess.Popen[bytes]:
        code = f"from actors.serving import preparer; preparer.{limit}; preparer.main()"
        return subprocess.Popen([command[0], "-c", code, *command[3:]], **settings)

    monkeypatch.setattr(preparation, "subprocess", SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL))


def children(preparer: Preparer) -> list[psutil.Process]:
    assert preparer._process is not None
    return psutil.Process(preparer._process.pid).children()


def test_a_prompt_is_what_the_vocabulary_says(preparer: Preparer, words: Vocabulary) -> None:
    prepared = preparer.prepare(content_of(prompt="the salt"), N_CTX)
    assert prepared.prompts == (words.tokenize("the salt", add_special=True),)
    assert prepared.constraint is None
    several = preparer.prepare(content_of(inputs=["the salt", [5, 6, 7]]), N_CTX).prompts
    assert several == (prepared.prompts[0], [5, 6, 7])


def test_a_chat_goes_through_the_models_template(preparer: Preparer, words: Vocabulary) -> None:
    prepared = preparer.prepare(CHAT, N_CTX)
    assert prepared.prompts == (words.tokenize("<s>user:hello\nassistant:", add_special=False),)
    assert prepared.stops == () and prepared.syntax is None


def test_a_text_that_cannot_fit_is_not_even_cut_into_tokens(preparer: Preparer) -> None:
    with pytest.raises(Rejected, match=r"holds 512 tokens, at most .* of text"):
        preparer.prepare(content_of(prompt="x" * 10_000_000), N_CTX)


@pytest.mark.parametrize(
    "of",
    [
        {"type": "string", "maxLength": 20000},
        {"enum": [f"v{i}" for i in range(100_000)]},
        {"type": "array", "items": {"$ref": "#"}},
        {"type": "string", "pattern": "^(" * 300 + "a" + ")$" * 300},
    ],
)
def test_a_schema_costs_only_the_request_that_brings_it(of: dict[str, Any], preparer: Preparer) -> None:
    try:
        constraint = preparer.prepare(schema(of), N_CTX).constraint
        assert constraint is not None
        with closing(constraint):
            constraint.choose(lambda allowed: 5 if allowed is None else int(np.flatnonzero(allowed)[0]))
    except Rejected as refused:
        assert "schema" in refused.message  # which of both may depend on the machine's speed
    assert preparer.prepare(CHAT, N_CTX).prompts


def test_another_answer_gets_a_grammar_of_its_own(preparer: Preparer) -> None:
    asked = schema({"enum": ["a", "b"]})
    first = preparer.prepare(asked, N_CTX).constraint
    assert first is not None
    with closing(first), closing(preparer.constraint(asked, N_CTX, None, None)) as other:
        for constraint in (first, other):
            constraint.choose(lambda allowed: 5 if allowed is None else int(np.flatnonzero(allowed)[0]))
    with pytest.raises(EngineFailed, match="none for the next"):
        preparer.constraint(CHAT, N_CTX, None, None)
    assert preparer.prepare(CHAT, N_CTX).prompts


def test_a_schema_that_explodes_later_ends_its_own_answer_only(preparer: Preparer, words: Vocabulary) -> None:
    constraint = preparer.prepare(schema(EXPONENTIAL), N_CTX).constraint
    assert constraint is not None
    said = iter([words.tokenize(each, add_special=False)[-1] for each in ('"', "x")])
    with pytest.raises(Rejected, match=r"cannot be followed: (it took more than|it needs more|its process was ended)"):
        while (token := next(said)) is not None:
            constraint.choose(lambda allowed, token=token: token)  # type: ignore[misc]
    constraint.close()
    assert preparer.prepare(CHAT, N_CTX).prompts


def test_an_answer_has_a_budget_for_all_its_tokens(
    sample: Callable[..., Path], words: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_preparers(monkeypatch, "ANSWER_CPU_S = 0.05")
    with closing(started(sample("llama"))) as preparer:
        for _ in range(2):  # the next answer has its own
            constraint = preparer.prepare(schema({"type": "string"}), N_CTX).constraint
            assert constraint is not None
            said = itertools.chain(
                words.tokenize('"', add_special=False)[-1:],
                itertools.repeat(words.tokenize("x", add_special=False)[-1]),
            )
            with pytest.raises(Rejected, match=r"cannot be followed: it took more than .* for the whole answer"):
                while (token := next(said)) is not None:
                    constraint.choose(lambda allowed, token=token: token)  # type: ignore[misc]
            constraint.close()


def test_a_child_whose_runner_has_hung_up_computes_no_longer(
    sample: Callable[..., Path], words: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_preparers(monkeypatch, "CPU_S = 1000.0")
    with closing(started(sample("llama"))) as preparer:
        constraint = preparer.prepare(schema(EXPONENTIAL), N_CTX).constraint
        assert constraint is not None
        (child,) = children(preparer)
        began, failures = threading.Event(), []

        def choose() -> None:
            tokens = itertools.chain(
                words.tokenize('"', add_special=False)[-1:],
                itertools.repeat(words.tokenize("x", add_special=False)[-1]),
            )
            try:
                for token in tokens:
                    began.set()
                    constraint.choose(lambda allowed, token=token: token)
            except (Rejected, EngineFailed) as error:
                failures.append(error)

        thread = threading.Thread(target=choose)
        thread.start()
        began.wait()
        constraint.interrupt()
        thread.join()
        assert failures
        psutil.wait_procs([child], timeout=60)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
        constraint.close()
        assert preparer.prepare(CHAT, N_CTX).prompts


@pytest.mark.parametrize("ended_s", [0.0, 0.5])
def test_who_leaves_while_a_request_is_prepared_ends_the_child(
    ended_s: float, sample: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_preparers(monkeypatch, "CPU_S = 1000.0")
    with closing(with_template(sample("llama"), ENDLESS, tmp_path / "hostile.gguf")) as preparer:
        errand = Errand()
        threading.Timer(ended_s, errand.end).start()
        with pytest.raises(EngineFailed):
            preparer.prepare(CHAT, N_CTX, errand)
        # It may be forked only now: then it ends at once.
        wait_until(lambda: not [each for each in children(preparer) if each.status() != psutil.STATUS_ZOMBIE])
        assert preparer.prepare(content_of(prompt="the salt"), N_CTX).prompts


def test_a_refusal_is_short_whatever_it_quotes(preparer: Preparer) -> None:
    strange = [{"role": "assistant", "content": "x", "tool_calls": "a" * 400_000}]
    with pytest.raises(Rejected) as refused:
        preparer.prepare(content_of(messages=strange), N_CTX)
    assert len(refused.value.message) < 5000


def test_a_token_that_may_not_come_next_is_picked_anew(preparer: Preparer, words: Vocabulary) -> None:
    constraint = preparer.prepare(schema({"const": "ab"}), N_CTX).constraint
    assert constraint is not None
    text = b""
    for _ in range(9):
        picked = constraint.choose(lambda allowed: 1 if allowed is None else int(np.flatnonzero(allowed)[-1]))
        if words.piece(picked) == b"</s>":
            break
        text += words.piece(picked)
    assert json.loads(text) == "ab"
    constraint.close()


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (ENDLESS, "took more than"),
        (GROWING, "more memory|took more than"),
        ("{{ 'x' * 4000000000 }}", "chat template refused|took more than"),
        ("{% if %}", "chat template is broken"),
    ],
)
def test_a_template_is_a_strangers_program(
    template: str, why: str, sample: Callable[..., Path], tmp_path: Path
) -> None:
    with closing(with_template(sample("llama"), template, tmp_path / "hostile.gguf")) as preparer:
        with pytest.raises(Rejected, match=why) as refused:
            preparer.prepare(CHAT, N_CTX)
        assert "template" in refused.value.message or "template" in refused.value.details["step"]
        assert preparer.prepare(content_of(prompt="the salt"), N_CTX).prompts  # a plain prompt needs none


def test_children_are_reused_and_end_with_their_parent(sample: Callable[..., Path]) -> None:
    with closing(started(sample("llama"))) as preparer:
        for _ in range(5):
            preparer.prepare(CHAT, N_CTX)
        (child,) = children(preparer)
        grown = [preparer.prepare(schema({}), N_CTX).constraint for _ in range(4)]
        assert len(children(preparer)) == 4
        for constraint in grown:
            assert constraint is not None
            constraint.close()
        family = children(preparer)
    _, alive = psutil.wait_procs([child, *family], timeout=10)
    assert not alive


def test_a_child_that_examined_a_text_is_asked_again(sample: Callable[..., Path]) -> None:
    with closing(started(sample("llama"))) as preparer:
        preparer.prepare(content_of(examine={"tokenize": "one"}), N_CTX)
        (child,) = preparer._idle
        assert preparer.prepare(content_of(examine={"tokenize": "two"}), N_CTX).examined
        assert preparer._idle == [child]


LARGE = content_of(
    prompt="x",
    grammar="root ::= r0 "
    + "".join(f"| r{n} " for n in range(1, 40))
    + "\n"
    + "".join(f'r{n} ::= "{"abcdefghij" * 6}"{{2000}}\n' for n in range(40)),
)  # 5 kB of text that take some 40 MiB
LETTERS = content_of(prompt="x", grammar="root ::= [a-z]+")


def test_what_grammars_of_answers_hold_is_bounded_and_fair(sample: Callable[..., Path], monkeypatch: Any) -> None:
    with closing(started(sample("llama"))) as preparer:
        first = preparer.prepare(LARGE, N_CTX, source="ann")
        size = first.held_bytes
        assert size > 16 * MIB
        monkeypatch.setattr(child_memory, "MOST_OF_ONE_BYTES", 2 * size + MIB)
        monkeypatch.setattr(child_memory, "MOST_BYTES", 3 * size + 2 * MIB)
        second = preparer.prepare(LARGE, N_CTX, source="ann")
        with pytest.raises(Unavailable, match="Try again later, or simplify") as refused:
            preparer.prepare(LARGE, N_CTX, source="ann")
        assert refused.value.retry_after_s
        small = preparer.prepare(LETTERS, N_CTX, source="ann")  # takes next to nothing
        other = preparer.prepare(LARGE, N_CTX, source="ben")
        with pytest.raises(Unavailable):
            preparer.prepare(LARGE, N_CTX, source="cat")
        for prepared in (first, second, small, other):
            prepared.close()
        assert not preparer._memory.held_bytes
        wait_until(lambda: len(children(preparer)) == 1)  # only the small one is kept for the next requests
        monkeypatch.setattr(child_memory, "MOST_OF_ONE_BYTES", size - MIB)
        with pytest.raises(Rejected, match="at most"):
            preparer.prepare(LARGE, N_CTX, source="ann")


def test_what_one_request_may_never_hold_is_refused_at_once(sample: Any, spec: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(child_memory, "MOST_OF_ONE_BYTES", 100 * MIB)
    with closing(Engine(spec(sample("llama"), n_ctx=512))) as engine:
        request = GenerateRequest(LARGE, "r", max_tokens=2, n=8)
        with pytest.raises(Rejected, match="ask for fewer answers"):
            list(engine.generate(request))
        assert not engine._preparer._memory.held_bytes


def test_a_parser_that_grows_with_its_answer_is_counted() -> None:
    memory, (ours, child) = child_memory.ChildMemory(), socket.socketpair()
    given_back: list[int] = []
    parsing = Parsing(ours, lambda _, held_bytes: given_back.append(held_bytes), memory.hold("ann", 0))
    frames.send(child, Kind.DELTAS, HELD.pack(9 * MIB) + b'[{"content": "Hi"}]')
    assert parsing.feed("Hi") == (Delta("Hi"),)
    assert memory.held_bytes == 9 * MIB
    frames.send(child, Kind.DELTAS, HELD.pack(child_memory.MOST_OF_ONE_BYTES + MIB) + b"[]")
    with pytest.raises(Rejected, match=r"need 257\.0 MiB of memory"):
        parsing.feed("more")
    parsing.close()
    assert memory.held_bytes == 0 and given_back == [], "such a child is not used again"
    child.close()
    ours.close()


def test_a_prompt_of_too_many_tokens_does_not_reach_the_runner(preparer: Preparer, monkeypatch: Any) -> None:
    """Not even its tokens, which are lists of Python's: 3.2 million stopped all its threads for half a second."""
    received: list[int] = []
    receive = preparation.receive

    def noted(connection: socket.socket) -> Any:
        frame = receive(connection)
        received.append(len(frame[1]) if frame else 0)
        return frame

    monkeypatch.setattr(preparation, "receive", noted)
    text = "1 " * 2000  # fewer bytes than so many tokens may have
    for content in (content_of(prompt=text), content_of(messages=[{"role": "user", "content": text}])):
        with pytest.raises(Rejected, match=r"prompt is \d+ tokens; the slot holds 512"):
            preparer.prepare(content, N_CTX)
    assert sum(received) < 2000


def test_several_tokens_that_seem_to_be_allowed_are_tried() -> None:
    ours, child = socket.socketpair()
    constraint = Constraint(ours, lambda _, held_bytes: None, child_memory.ChildMemory().hold("ann", 0))
    for _ in range(3):
        frames.send(child, Kind.ALLOWED, HELD.pack(0) + b"\xff")
    frames.send(child, Kind.TAKEN, HELD.pack(0))
    picked = iter(range(10))
    assert constraint.choose(lambda allowed: next(picked)) == 3
    for _ in range(20):
        frames.send(child, Kind.ALLOWED, HELD.pack(0) + b"\xff")
    with pytest.raises(Rejected, match="cannot form"):
        constraint.choose(lambda allowed: 1)
    constraint.close()
    child.close()
    ours.close()


def test_a_token_that_begins_a_call_and_goes_on_wrongly_may_not_come(words: Vocabulary) -> None:
    """llama.cpp throws an exception over it. Every other token may come, and the same text in other tokens."""
    piece = {token: words.piece(token) for token in range(words.n_tokens)}
    begin = next(token for token, text in piece.items() if len(text) > 3 and text[1:].isalpha())
    start = piece[begin][:-1].decode()  # the trigger is a part of the token, and its last letter is not allowed
    trigger = {"type": WORD, "value": start}
    with closing(Grammar(words, f'root ::= "{start}" [0-9]+', [trigger])) as grammar:
        assert grammar.take(5)
        assert not grammar.take(begin) and not grammar.take(begin)
        flags = np.unpackbits(np.frombuffer(grammar.allowed(), np.uint8))[: words.n_tokens]
        assert not flags[begin] and flags.sum() == words.n_tokens - 1
        assert grammar.take(6), "it still waits for the beginning of a call"


def test_a_grammar_that_grows_while_it_is_followed_is_counted() -> None:
    memory, (ours, child) = child_memory.ChildMemory(), socket.socketpair()
    given_back: list[int] = []
    constraint = Constraint(ours, lambda _, held_bytes: given_back.append(held_bytes), memory.hold("ann", MIB))
    frames.send(child, Kind.TAKEN, HELD.pack(9 * MIB))
    assert constraint.choose(lambda allowed: 5) == 5
    assert memory.held_bytes == 9 * MIB
    frames.send(child, Kind.ALLOWED, HELD.pack(child_memory.MOST_OF_ONE_BYTES + MIB) + b"\xff")
    with pytest.raises(Rejected, match=r"need 257\.0 MiB of memory"):
        constraint.choose(lambda allowed: 5)
    constraint.close()
    assert memory.held_bytes == 0 and given_back == [], "such a child is not used again"
    child.close()
    ours.close()


def test_a_preparer_that_was_killed_is_started_again(sample: Callable[..., Path]) -> None:
    with closing(started(sample("llama"))) as preparer:
        assert preparer.prepare(CHAT, N_CTX).prompts
        assert preparer._process is not None
        family = children(preparer)
        os.kill(preparer._process.pid, signal.SIGKILL)
        psutil.wait_procs(family, timeout=10)
        assert preparer.prepare(CHAT, N_CTX).prompts


def test_a_child_that_was_killed_takes_one_request_at_the_most(preparer: Preparer) -> None:
    preparer.prepare(CHAT, N_CTX)
    for child in children(preparer):
        child.kill()
    while children(preparer):
        time.sleep(0.01)
    assert preparer.prepare(CHAT, N_CTX).prompts


def test_who_is_choosing_can_be_interrupted(preparer: Preparer) -> None:
    constraint = preparer.prepare(schema({}), N_CTX).constraint
    assert constraint is not None
    for child in children(preparer):
        child.suspend()
    asked = threading.Event()

    def pick(allowed: object) -> int:
        asked.set()
        return 5

    def interrupt() -> None:
        asked.wait()
        constraint.interrupt()

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises((EngineFailed, Rejected)):
        constraint.choose(pick)
    interrupting.join()
    constraint.close()
    for child in children(preparer):
        child.resume()


def test_frames_survive_pieces_and_notice_an_end_in_their_midst() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sending = threading.Thread(target=frames.send, args=(ours, 7, b"x" * 3_000_000))
        sending.start()
        assert frames.receive(theirs) == (7, b"x" * 3_000_000)
        sending.join()
        ours.sendall(b"\x10\0\0\0\1abc")
        ours.close()
        with pytest.raises(frames.BrokenFrame, match="middle"):
            frames.receive(theirs)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"\xff\xff\xff\xff\1")
        with pytest.raises(frames.BrokenFrame, match="4294967295 bytes"):
            frames.receive(theirs)
        ours.close()
    ours, theirs = socket.socketpair()
    with theirs:
        ours.close()
        assert frames.receive(theirs) is None
