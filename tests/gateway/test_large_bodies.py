"""Bodies that would cost much to read: what is told of them, where they are read, and what ends a reading."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gateway_fakes import MODEL, FakeBackend, content, web

from actors.gateway import parsers
from actors.gateway.bodies import MAX_FIELDS, checked
from actors.gateway.errors import BodyTooLarge
from actors.gateway.forms import Form, read_ask
from actors.gateway.limits import INLINE_BYTES, MAX_BODY_BYTES, MAX_ORDER_BYTES
from actors.gateway.openai_requests import MAX_STOP_LENGTH
from actors.gateway.parsers import Parsers
from actors.gateway.sampler_settings import MAX_BIASES
from actors.records import LoadRequest
from scheduler.errors import Rejected

ROOT = Path(__file__).parents[2]
PROMPT = b'{"model": "tiny", "prompt": ['
CHAT = b'{"model": "tiny", "messages": ['
TURN = b'{"role": "user", "content": "Hi"}'
MOST_TOLD = 600


def many(before: bytes, unit: bytes, after: bytes, n: int = 10_000) -> bytes:
    return before + unit * n + after


def chat(text: str) -> bytes:
    return json.dumps({"model": MODEL, "messages": [{"role": "user", "content": text}]}).encode()


@pytest.mark.parametrize(
    ("form", "body"),
    [
        ("text", many(PROMPT, b"{},", b"{}]}")),
        ("text", many(PROMPT, b"1,", b'"a"]}')),
        ("text", many(PROMPT, b'"a",', b"1]}")),
        ("text", many(PROMPT, b"[1],", b"[-1]]}")),
        ("text", many(PROMPT, b"[{}],", b"[{}]]}")),
        ("embed", many(PROMPT.replace(b"prompt", b"input"), b"null,", b"0]}")),
        ("chat", many(CHAT, b"{},", b"{}]}")),
        ("chat", many(CHAT + b'{"role": "user", "content": [', b"0,", b"0]}]}")),
        ("chat", CHAT + TURN + b'], "stop": [' + b"0," * 10_000 + b"0]}"),
        ("chat", CHAT + TURN + b'], "modalities": [' + b"0," * 10_000 + b"0]}"),
        ("chat", CHAT + TURN + b'], "stop": "' + b"x" * (MAX_STOP_LENGTH + 1) + b'"}'),
        ("chat", CHAT + TURN + b'], "response_format": {"type": "' + b"x" * 10_000 + b'"}}'),
        ("chat", CHAT + b'{"role": "user", "content": [{"type": "' + b"x" * 10_000 + b'"}]}]}'),
        ("chat", json.dumps({"model": MODEL, "messages": [], "logit_bias": {f"{'x' * 999}{i}": 1 for i in range(9)}})),
        ("chat", json.dumps({"model": MODEL, "messages": [], "logit_bias": dict.fromkeys(range(MAX_BIASES + 1), 1)})),
        ("chat", json.dumps({"x" * 999 + str(i): 1 for i in range(MAX_FIELDS + 1)})),
        ("chat", b'{"model": "tiny", "n": ' + b"9" * 4000 + b', "messages": [' + TURN + b"]}"),
    ],
)
def test_what_is_told_of_a_body_is_short(form: Form, body: bytes | str) -> None:
    with pytest.raises(Rejected) as caught:
        read_ask(form, body if isinstance(body, bytes) else body.encode(), "id", "")
    assert 10 < len(caught.value.message) < MOST_TOLD
    assert len(str(caught.value.details)) < MOST_TOLD


def test_of_many_unknown_fields_three_are_told() -> None:
    with pytest.raises(Rejected, match=r"f0: .*; f1: .*; f2: .*; and 7 more") as caught:
        checked(LoadRequest, json.dumps({"model": MODEL, **{f"f{i}": 1 for i in range(10)}}).encode())
    assert caught.value.details["param"] == "f0"


def nested(n: int, opening: str = '{"a":', closing: str = "}") -> str:
    return opening * n + "1" + closing * n


PLACES = [
    '{{"model": "tiny", "messages": [{{"role": "user", "content": "Hi", "extra": {0}}}]}}',
    '{{"model": "tiny", "messages": [{{"role": "user", "content": [{{"type": "text", "text": "Hi", "x": {0}}}]}}]}}',
    '{{"model": "tiny", "messages": [{{"role": "user", "content": "Hi"}}], "unknown": {0}}}',
    '{{"model": "tiny", "messages": [{{"role": "user", "content": "Hi"}}], "response_format":'
    ' {{"type": "json_schema", "json_schema": {{"schema": {{"x": {0}}}}}}}}}',
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("opening", "closing"), [('{"a":', "}"), ("[", "]")])
def test_deep_bodies_are_refused_by_their_depth(
    url: str, backend: FakeBackend, place: str, opening: str, closing: str
) -> None:
    headers = {"Content-Type": "application/json"}
    for levels, status in ((100, 200), (900, 400), (10_000, 400), (100_000, 400)):
        body = place.format(nested(levels, opening, closing))
        reply = web.post(f"{url}/v1/chat/completions", content=body, headers=headers)
        assert reply.status_code == status, levels
        assert status == 200 or "deeper than 200 levels" in reply.json()["error"]["message"]
    assert len(backend.wait_for("generate")) == 1


def test_a_long_request_arrives_whole(url: str, backend: FakeBackend) -> None:
    text = "Maultiere tragen schwer – 騾馬 " * (INLINE_BYTES // 16)
    reply = web.post(f"{url}/v1/chat/completions", content=chat(text), headers={"Content-Type": "application/json"})
    assert reply.status_code == 200
    ((_, request),) = backend.wait_for("generate")
    assert content(request)["messages"][0]["content"] == text


def test_a_million_wrong_values_are_one_short_answer(url: str, backend: FakeBackend) -> None:
    body = many(PROMPT, b"{},", b"{}]}", 10**6)
    reply = web.post(f"{url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and len(reply.content) < 2 * MOST_TOLD
    assert reply.json()["error"]["param"] == "prompt"
    assert not backend.journal


@pytest.mark.parametrize("order", ["load", "unload", "pin"])
def test_an_order_is_short(url: str, backend: FakeBackend, order: str) -> None:
    reply = web.post(f"{url}/api/v1/{order}", json={"model": "x" * MAX_ORDER_BYTES})
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
    assert not backend.journal


# --- the processes that read ---


def in_processes(scenario: Any, processes: int = 1) -> Any:
    async def run() -> Any:
        readers = Parsers(processes)
        try:
            return await scenario(readers)
        finally:
            readers.close()

    return asyncio.run(run())


def test_a_process_reads_as_the_gateway_does() -> None:
    body, wrong = chat("Hi " * INLINE_BYTES), PROMPT + b"{}]}"

    async def scenario(readers: Parsers) -> None:
        assert await readers.read_ask("chat", body, "id", "ann") == read_ask("chat", body, "id", "ann")
        with pytest.raises(Rejected) as caught:
            await readers.read_ask("text", wrong, "id", "")
        with pytest.raises(Rejected) as directly:
            read_ask("text", wrong, "id", "")
        assert (caught.value.message, caught.value.details) == (directly.value.message, directly.value.details)

    in_processes(scenario)


@pytest.mark.slow
def test_the_shortest_body_is_read_first() -> None:
    async def scenario(readers: Parsers) -> list[str]:
        read: list[str] = []

        async def ask(name: str, size: int) -> None:
            await readers.read_ask("chat", chat("x" * size), name, "")
            read.append(name)

        await asyncio.gather(ask("long", 300_000), ask("middle", 200_000), ask("short", 100_000))
        return read

    assert in_processes(scenario) == ["short", "middle", "long"]


@pytest.mark.slow
def test_a_process_that_stands_still_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does whose libraries wait for themselves when no memory is left."""
    still = "import socket, time; s = socket.socket(fileno=0); s.sendall(b'ready'); s.recv(1); time.sleep(1000)"
    start = subprocess.Popen

    async def scenario(readers: Parsers) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(parsers, "LOOK_EVERY_S", 0.05)
            patched.setattr(subprocess, "Popen", lambda command, **more: start([sys.executable, "-c", still], **more))
            with pytest.raises(BodyTooLarge, match=r"more than 512\.0 MiB of memory"):
                await readers.read_ask("chat", chat("x"), "id", "")
        assert (await readers.read_ask("chat", chat("next"), "id", "")).need.model == MODEL

    in_processes(scenario)


def test_sources_take_turns() -> None:
    async def scenario(readers: Parsers) -> list[str]:
        read: list[str] = []

        async def ask(source: str, name: str, size: int) -> None:
            await readers.read_ask("chat", chat("x" * size), name, "", source)
            read.append(name)

        flood = (ask("ann", f"ann {n}", 70_000) for n in range(6))
        await asyncio.gather(*flood, ask("bob", "bob", 300_000))
        return read

    read = in_processes(scenario)
    assert read.index("bob") <= 2, read


@pytest.mark.slow
def test_a_long_body_does_not_wait_for_ever() -> None:
    """Shorter ones that come later do not all go first."""

    async def scenario(readers: Parsers) -> list[str]:
        read: list[str] = []

        async def ask(name: str, size: int) -> None:
            await readers.read_ask("chat", chat("x" * size), name, "")
            read.append(name)

        long = asyncio.ensure_future(ask("long", parsers.BYTES_PER_S // 50))
        flood: list[asyncio.Task[None]] = []
        while "long" not in read:  # there is always something shorter
            flood.append(asyncio.ensure_future(ask("short", 100)))
            await asyncio.sleep(0.001)
        await asyncio.gather(long, *flood)
        return read

    assert in_processes(scenario).count("long") == 1


@pytest.mark.slow
def test_a_body_that_takes_too_long_is_refused_and_the_next_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(readers: Parsers) -> None:
        await readers.read_ask("chat", chat("first"), "id", "")
        monkeypatch.setattr(parsers, "PARSE_S", 0.0)
        with pytest.raises(BodyTooLarge, match=r"\(5\.7 MiB\) took more than 0 s"):
            await readers.read_ask("text", many(PROMPT, b"[[]],", b"0]}", 1_200_000), "id", "")
        monkeypatch.undo()
        assert (await readers.read_ask("chat", chat("next"), "id", "")).need.model == MODEL

    in_processes(scenario)


@pytest.mark.slow
def test_a_body_that_takes_too_much_memory_is_refused_and_the_next_one_read() -> None:
    unit = b'{"role":""},'
    body = many(CHAT, unit, TURN + b"]}", MAX_BODY_BYTES // len(unit) - 10)

    async def scenario(readers: Parsers) -> None:
        with pytest.raises(BodyTooLarge, match=r"\(32\.0 MiB\) took more than (512\.0 MiB of memory|5 s of processor)"):
            await readers.read_ask("chat", body, "id", "")
        assert (await readers.read_ask("chat", chat("next"), "id", "")).need.model == MODEL

    in_processes(scenario)


def test_who_has_left_is_not_read_for() -> None:
    async def scenario(readers: Parsers) -> None:
        gone = asyncio.ensure_future(readers.read_ask("chat", chat("gone" * 1000), "gone", ""))
        await asyncio.sleep(0)
        gone.cancel()
        ask = await readers.read_ask("chat", chat("here" * 100), "here", "")
        assert ask.need.request_id == "here"
        with pytest.raises(asyncio.CancelledError):
            await gone

    in_processes(scenario)


@pytest.mark.slow
def test_a_process_ends_with_the_gateway() -> None:
    code = """
import asyncio, os, signal
from actors.gateway.parsers import _Process
async def main():
    process = await _Process.start()
    print(process._child.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    for _ in itertools.count():  # the test's own time-out is the limit
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            break
        os.sched_yield()
