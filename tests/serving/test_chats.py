"""Chats with tools and thoughts, from the request to what the client reads, through llama.cpp's own chat code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Semaphore
from types import SimpleNamespace
from typing import Any

import pytest

from actors.serving import parsing as parsing_module
from actors.serving.conversation import Parsing
from actors.serving.counted_text import CountedText
from actors.serving.engine import Engine
from actors.serving.generation import Generation, Wish
from actors.serving.jobs import Results
from actors.serving.message import Call
from actors.serving.parsing import MOST_HELD, ParsedAnswer
from actors.serving.preparation import Preparer
from actors.serving.protocol import Chunk, Delta, GenerateRequest, Likelihood, ReplyForm, Sampling, content_of
from actors.serving.replies import Reply
from actors.serving.text import TextStream
from actors.serving.vocabulary import Vocabulary
from scheduler.errors import EngineFailed, Rejected

pytestmark = pytest.mark.llama

N_CTX = 2048
EOS = 2
HERMES = """{%- if tools %}<|im_start|>system
You may call tools: {% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call one with <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{% if message.content %}{{ message.content }}{% endif %}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
"""A template as many models have it: tool calls as JSON between tags, thoughts between others."""

CITY = {"type": "object", "properties": {"city": {"enum": ["Lima", "Cusco"]}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "now", "parameters": CITY}}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
HELLO = [{"role": "user", "content": "What is the weather in Lima?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Lima"}}\n</tool_call>'


@pytest.fixture(scope="module")
def preparer(sample: Callable[..., Path]) -> Iterator[Preparer]:
    with closing(Preparer()) as preparer:
        preparer.read(str(sample("llama")), HERMES)
        yield preparer


@pytest.fixture(scope="module")
def words(sample: Callable[..., Path]) -> Vocabulary:
    return Vocabulary(str(sample("llama")))


def parsing(preparer: Preparer, **content: Any) -> Parsing:
    prepared = preparer.prepare(content_of(messages=HELLO, **content), N_CTX)
    if prepared.constraint is not None:
        prepared.constraint.close()
    assert prepared.syntax is not None
    return preparer.parsing(prepared.syntax)


def fed(parsing: Parsing, text: str, step: int, last: Any = "stop") -> list[Delta]:
    with closing(parsing):
        deltas = [delta for at in range(0, len(text), step) for delta in parsing.feed(text[at : at + step])]
        return [*deltas, *parsing.feed("", last=last)]


def message(deltas: list[Delta]) -> tuple[str, str, dict[int, tuple[str, str]]]:
    """Thoughts, content, and name and arguments of each call."""
    calls: dict[int, tuple[str, str]] = {}
    for delta in deltas:
        if delta.tool is not None:
            name, arguments = calls.get(delta.tool, ("", ""))
            calls[delta.tool] = (delta.name or name, arguments + delta.arguments)
    return "".join(delta.reasoning for delta in deltas), "".join(delta.content for delta in deltas), calls


@pytest.mark.parametrize("step", [1, 3, 7, 1000])
def test_thoughts_and_calls_are_read_from_the_text_wherever_it_is_cut(preparer: Preparer, step: int) -> None:
    text = f"<think>\nWhere is Lima? ☂\n</think>\n\nI look.\n{CALL}"
    thoughts, content, calls = message(fed(parsing(preparer, tools=[WEATHER, TIME]), text, step))
    assert thoughts.strip() == "Where is Lima? ☂"
    assert content.strip() == "I look."
    assert {number: (name, json.loads(arguments)) for number, (name, arguments) in calls.items()} == {
        0: ("weather", {"city": "Lima"})
    }


@pytest.mark.parametrize("together", [1, 5])
@pytest.mark.parametrize("ends", [None, 7], ids=["whole", "cut"])
def test_tokens_of_thoughts_are_counted(preparer: Preparer, together: int, ends: int | None) -> None:
    """Tokens of a byte each, but for the tags; `together`: so many are parsed at once."""
    text = f"I think. ☂ {CALL}"
    pieces = [b"<think>", *(bytes([byte]) for byte in "\nSo ☂ ☂\n".encode()), b"</think>"]
    pieces = [*pieces, *(letter.encode() for letter in text)][:ends]
    results: Results[Chunk] = Results()
    counted = CountedText()
    answer = ParsedAnswer(results, parsing(preparer, tools=[WEATHER]), counted)
    shown = ""
    for number, piece in enumerate(pieces, 1):
        shown += counted.push(piece)
        if number % together == 0:
            answer.say(Chunk(shown))
            shown = ""
    answer.say(Chunk(shown + counted.finish(), "length" if ends else "stop", completion_tokens=len(pieces)))
    answer.end(None)
    chunks = list(results)
    thoughts = "".join(delta.reasoning for chunk in chunks for delta in chunk.deltas or ())
    assert (thoughts, chunks[-1].reasoning_tokens) == (("So �", 5) if ends else ("So ☂ ☂\n", 11))
    assert [chunk.reasoning_tokens for chunk in chunks[:-1]] == [0] * (len(chunks) - 1)


def test_an_answer_that_is_cut_off_says_what_can_be_read(preparer: Preparer) -> None:
    half = f"I look. {CALL[:-25]}"
    _, content, calls = message(fed(parsing(preparer, tools=[WEATHER]), half, 4, last="length"))
    assert content.strip() == "I look."
    assert calls[0][0] == "weather" and '{"city": "Lima"}'.startswith(calls[0][1])


def test_without_tools_a_call_is_text(preparer: Preparer) -> None:
    prepared = preparer.prepare(content_of(messages=HELLO), N_CTX)
    if prepared.syntax is None:  # nothing to parse
        return
    _, content, calls = message(fed(preparer.parsing(prepared.syntax), CALL, 5))
    assert not calls and content == CALL


def test_what_is_wrong_with_tools_is_said(preparer: Preparer) -> None:
    strange = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": 7}}}
    with pytest.raises(Rejected, match=r"the tools or the JSON schema|must be an object"):
        preparer.prepare(content_of(messages=HELLO, tools=[strange], tool_choice="required"), N_CTX)
    assert preparer.prepare(content_of(messages=HELLO), N_CTX).prompts


def test_tools_thoughts_and_what_was_said_before_reach_the_prompt(preparer: Preparer, words: Vocabulary) -> None:
    def prompt(**content: Any) -> str:
        prepared = preparer.prepare(content_of(**content), N_CTX)
        if prepared.constraint is not None:
            prepared.constraint.close()
        (tokens,) = prepared.prompts
        return b"".join(map(words.piece, tokens)).decode()

    asked = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}
    history = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [asked]},
        {"role": "tool", "tool_call_id": "c1", "content": "drizzle"},
    ]
    said = prompt(messages=history, tools=[WEATHER])
    assert '"weather"' in said and "drizzle" in said and '"city": "Lima"' in said
    assert "</think>" not in prompt(messages=HELLO)
    assert "</think>" in prompt(messages=HELLO, chat_template_kwargs={"enable_thinking": False})
    assert "</think>" in prompt(messages=HELLO, reasoning_effort="none")
    begun = [*HELLO, {"role": "assistant", "content": "It is in"}]
    assert prompt(messages=begun, continue_final_message=True).endswith("It is in")


def said_under(constraint: Any, words: Any, text: str) -> str:
    """What becomes of an answer that wants to be `text`: where a token may not come next, the first that may does."""
    said = b""
    with closing(constraint):
        for token in [*words.tokenize(text, add_special=False), EOS]:
            chosen = constraint.choose(lambda allowed, t=token: t if allowed is None else int(allowed.nonzero()[0][0]))
            if chosen == EOS:
                break
            said += words.piece(chosen)
    return said.decode(errors="replace").lstrip()


@pytest.mark.parametrize(
    ("choice", "text", "becomes"),
    [
        ("auto", CALL, CALL),
        ("auto", "No call at all.", "No call at all."),
        ("required", CALL, CALL),
        ("auto", CALL.replace("Lima", "Rome"), None),
        ("auto", CALL.replace("weather", "forecast"), None),
        ("auto", "<think>\nA <tool_call> here?\n</think>\n\nNo.", "<think>\nA <tool_call> here?\n</think>\n\nNo."),
    ],
)
def test_calls_follow_the_schemas_of_the_tools(
    choice: str, text: str, becomes: str | None, preparer: Preparer, words: Vocabulary
) -> None:
    content = content_of(messages=HELLO, tools=[WEATHER], tool_choice=choice)
    constraint = preparer.prepare(content, N_CTX).constraint
    said = said_under(constraint, words, text)
    if becomes is None:
        assert said != text
    else:
        assert said == becomes


def test_an_answer_in_a_format_is_that_format(sample: Any, spec: Any) -> None:
    with closing(Engine(replace(spec(sample("llama"), n_ctx=N_CTX), chat_template=HERMES))) as engine:
        content = content_of(messages=HELLO, json_schema=CITY)
        chunks = list(engine.generate(GenerateRequest(content, "r", max_tokens=400, sampling=Sampling(temperature=0))))
        _, said, _ = message([delta for chunk in chunks for delta in chunk.deltas or ()])
        assert json.loads(said)["city"] in ("Lima", "Cusco")


THINKER = HERMES.replace("<|im_start|>assistant\n{% if enable", "<|im_start|>assistant\n<think>\n{% if enable").replace(
    "<think>\n\n</think>", "\n</think>"
)
"""A template that begins every answer with a thought."""


@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["plain", "tools"])
@pytest.mark.parametrize("budget", [0, 5])
def test_thoughts_end_after_their_budget(budget: int, tools: Any, sample: Any, spec: Any) -> None:
    """The sample model would think for ever."""
    with closing(Engine(replace(spec(sample("llama"), n_ctx=N_CTX), chat_template=THINKER))) as engine:

        def answer(**content: Any) -> tuple[str, str, Any, int]:
            asked = content_of(messages=HELLO, tools=tools, **content)
            request = GenerateRequest(asked, "r", max_tokens=40, sampling=Sampling(temperature=0))
            chunks = list(engine.generate(request))
            return *message([delta for chunk in chunks for delta in chunk.deltas or ()]), chunks[-1].reasoning_tokens

        thought, said, _, n_thoughts = answer()
        assert thought and not said and 38 <= n_thoughts <= 40  # some may be blank, which is no part of the thought
        thought, said, _, n_thoughts = answer(thinking_budget_tokens=budget)
        assert said and bool(thought.strip()) == bool(budget)
        assert n_thoughts <= budget and bool(n_thoughts) == bool(thought)


@pytest.mark.parametrize("asked", [{"messages": HELLO}, {"prompt": "Say:"}], ids=["chat", "prompt"])
def test_an_answer_follows_a_grammar_of_the_client_s(
    asked: dict[str, Any], preparer: Preparer, words: Vocabulary
) -> None:
    content = content_of(**asked, grammar='root ::= "yes" | "no"')
    constraint = preparer.prepare(content, N_CTX).constraint
    assert said_under(constraint, words, "no") == "no"
    assert said_under(preparer.prepare(content, N_CTX).constraint, words, "maybe") in ("yes", "no")
    with pytest.raises(Rejected, match="cannot use"):
        preparer.prepare(content_of(**asked, grammar="root ::= nothing"), N_CTX)


# ---------------------------------------------------------------------- on its way


class FakeParsing:
    """Everything is content; "bad" cannot be parsed."""

    def __init__(self) -> None:
        self.closed = 0
        self.fed = Semaphore(0)

    def feed(self, text: str, *, last: Any = None) -> tuple[Delta, ...]:
        self.fed.release()
        if "bad" in text:
            raise EngineFailed("its preparer has ended")
        return (Delta(content=text),) if text else ()

    def close(self) -> None:
        self.closed += 1


def test_a_parsed_answer_tells_everything_in_order_and_then_its_end() -> None:
    results: Results[Chunk] = Results()
    fake = FakeParsing()
    answer = ParsedAnswer(results, fake, CountedText())  # type: ignore[arg-type]
    for number in range(200):
        answer.say(Chunk(f"{number} "))
    answer.say(Chunk("end", "stop", 5, 0, 7))
    answer.end(None)
    chunks = list(results)
    said = "".join(delta.content for chunk in chunks for delta in chunk.deltas or ())
    assert said == " ".join(map(str, range(200))) + " end"
    assert (chunks[-1].finish_reason, chunks[-1].completion_tokens) == ("stop", 7)
    assert fake.closed == 1


def test_pieces_wait_while_parsing_rests_but_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longer the text, the longer each piece takes. Together they take as long as one."""
    monkeypatch.setattr(parsing_module, "LONGEST_REST_S", 60.0)
    monkeypatch.setattr(parsing_module, "REST", 1_000_000)
    results: Results[Chunk] = Results()
    fake = FakeParsing()
    answer = ParsedAnswer(results, fake, CountedText())  # type: ignore[arg-type]
    answer.say(Chunk("0 "))
    assert fake.fed.acquire(timeout=10)
    for number in range(1, 50):
        answer.say(Chunk(f"{number} "))
    answer.say(Chunk("end", "stop", 5, 0, 7))
    answer.end(None)
    chunks = list(results)
    assert [chunk.text for chunk in chunks] == ["0 ", " ".join(map(str, range(1, 50))) + " end"]


def test_likelihoods_of_what_is_not_shown_do_not_pile_up() -> None:
    """Here what is parsed adds nothing to the message for long."""
    results: Results[Chunk] = Results()
    fake = FakeParsing()
    answer = ParsedAnswer(results, fake, CountedText())  # type: ignore[arg-type]
    for _ in range(10):
        answer.say(Chunk("", likelihoods=(Likelihood(1, b"", -1.0),) * MOST_HELD))
        assert fake.fed.acquire(timeout=10)
    answer.say(Chunk("end", "stop", 5, 0, 1000))
    answer.end(None)
    reply = Reply(ReplyForm("chat", stream=True))
    events = [event for chunk in results for event in reply.bytes_of(chunk).decode().splitlines()]
    assert [count for event in events if (count := event.count('"token"'))] == [MOST_HELD] * 10


def test_an_answer_that_cannot_be_parsed_ends_with_the_reason_and_its_generation_too() -> None:
    results: Results[Chunk] = Results()
    fake, given_up = FakeParsing(), []
    answer = ParsedAnswer(results, fake, CountedText())  # type: ignore[arg-type]
    answer.give_up = lambda: (given_up.append(1), answer.end(None))
    answer.say(Chunk("good "))
    answer.say(Chunk("bad"))
    with pytest.raises(EngineFailed, match="preparer has ended"):
        list(results)
    assert given_up == [1] and fake.closed == 1


class Tripping(Results[Chunk]):
    """Cannot tell what it hears."""

    def say(self, result: Chunk) -> None:
        raise RecursionError("too deep")


def test_an_answer_that_cannot_be_told_ends_all_the_same() -> None:
    results = Tripping()
    fake = FakeParsing()
    answer = ParsedAnswer(results, fake, CountedText())  # type: ignore[arg-type]
    answer.give_up = lambda: answer.end(None)
    answer.say(Chunk("good "))
    with pytest.raises(EngineFailed, match="RecursionError"):
        list(results)
    assert fake.closed == 1


def test_a_job_that_is_closed_before_it_began_gives_its_parser_back() -> None:
    fake = FakeParsing()
    answer = ParsedAnswer(Results(), fake, CountedText())  # type: ignore[arg-type]
    job = Generation("r", [1], answer, SimpleNamespace(close=lambda: None), TextStream(), Wish(5))
    job.close()
    job.end()
    assert fake.closed == 1


def test_arguments_that_nest_too_deeply_are_no_object() -> None:
    call = Call(arguments='{"a": ' + "[" * 100_000)
    assert call.as_object() == {}
    assert Call(arguments='{"a": ' + "[" * 5_000 + "]" * 5_000 + "}").as_object() == {}


def test_a_piece_may_hold_any_character(preparer: Preparer) -> None:
    _, content, _ = message(fed(parsing(preparer, tools=[WEATHER]), "before\0after", 4))
    assert content == "before\0after"


def test_an_answer_that_never_began_ends_at_once() -> None:
    results: Results[Chunk] = Results()
    fake = FakeParsing()
    ParsedAnswer(results, fake, CountedText()).end(Rejected("no"))  # type: ignore[arg-type]
    with pytest.raises(Rejected):
        list(results)
    assert fake.closed == 1


# ---------------------------------------------------------------------- what the client reads

DELTAS = (
    Delta(reasoning="Let me "), Delta(reasoning="see."), Delta(content="I look."),
    Delta(tool=0, name="wea"), Delta(tool=0, name="weather"), Delta(tool=0, name="weather", arguments='{"city"'),
    Delta(tool=0, arguments=': "Lima"}'), Delta(tool=1, name="time"),
)  # fmt: skip
LAST = Chunk("", "stop", 9, 2, 30, 4, deltas=())


def events(form: ReplyForm) -> list[dict[str, Any]]:
    reply = Reply(form)
    said = b"".join(reply.bytes_of(Chunk("", deltas=(delta,))) for delta in DELTAS) + reply.bytes_of(LAST)
    *lines, done = said.decode().split("\n\n")[:-1]
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_stream_tells_thoughts_content_and_calls_as_openai_does() -> None:
    told = events(ReplyForm("chat", stream=True, include_usage=True))
    deltas = [event["choices"][0]["delta"] for event in told if event["choices"]]
    assert deltas[0] == {"role": "assistant", "content": None, "reasoning_content": "Let me "}
    assert deltas[1:3] == [{"reasoning_content": "see."}, {"content": "I look."}]
    first, second, third = (delta["tool_calls"][0] for delta in deltas[3:6])
    assert first.pop("id").startswith("call_") and third.pop("id").startswith("call_")
    assert first == {"index": 0, "type": "function", "function": {"name": "weather", "arguments": '{"city"'}}
    assert second == {"index": 0, "function": {"arguments": ': "Lima"}'}}
    assert third == {"index": 1, "type": "function", "function": {"name": "time", "arguments": ""}}
    assert deltas[6] == {} and told[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert told[-1]["usage"]["completion_tokens"] == 30
    assert told[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}


def test_a_whole_answer_has_them_in_its_message() -> None:
    reply = Reply(ReplyForm("chat"))
    for delta in DELTAS:
        assert reply.bytes_of(Chunk("", deltas=(delta,))) == b""
    told = json.loads(reply.bytes_of(LAST))
    (choice,) = told["choices"]
    said = choice["message"]
    assert (said["reasoning_content"], said["content"], choice["finish_reason"]) == (
        "Let me see.", "I look.", "tool_calls",
    )  # fmt: skip
    assert [call["function"] for call in said["tool_calls"]] == [
        {"name": "weather", "arguments": '{"city": "Lima"}'},
        {"name": "time", "arguments": ""},
    ]
    assert told["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}


def test_functions_of_old_are_answered_as_such() -> None:
    told = events(ReplyForm("chat", stream=True, as_functions=True))
    assert told[3]["choices"][0]["delta"] == {"function_call": {"name": "weather", "arguments": '{"city"'}}
    assert told[-1]["choices"][0]["finish_reason"] == "function_call"
