"""`Client` and `AsyncClient` against a real gateway; the documentation's examples run here too."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway_fakes import MODEL, FakeBackend, Gate, content, serve

from actors.gateway.server import listen, url_of
from actors.records import Health, Notice
from actors.serving.protocol import Chunk, Delta
from arriero import AsyncClient, Client, api, calls
from scheduler.errors import EngineFailed, QueueFull, Rejected, Unavailable, UnknownModel

DOCS = Path(__file__).parents[2] / "docs"
NEWS = [Notice(seq=seq, at_s=1.0, kind="ReplicaReady", message="m") for seq in (1, 2)]


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


def in_async(url: str, scenario: Callable[[AsyncClient], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        async with AsyncClient(url) as client:
            await scenario(client)

    asyncio.run(run())


def test_chat(client: Client, backend: FakeBackend) -> None:
    answer = client.chat(MODEL, "Hi", max_tokens=5, stop=["END"], temperature=0, n_ctx=512)
    assert (answer.text, answer.finish_reason, answer.model) == ("Hello", "stop", MODEL)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 2)
    ((_, request),) = backend.saw("generate")
    assert content(request) == {"messages": [{"role": "user", "content": "Hi"}]}
    assert (request.max_tokens, request.stop, request.sampling.temperature) == (5, ("END",), 0.0)
    ((need,),) = backend.saw("acquire")
    assert need.n_ctx == 512


def test_chat_with_messages(client: Client, backend: FakeBackend) -> None:
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    client.chat(MODEL, turns)
    ((_, request),) = backend.saw("generate")
    assert content(request) == {"messages": turns}


def test_thoughts_and_calls_are_apart_from_the_text(client: Client, backend: FakeBackend) -> None:
    deltas = (Delta(reasoning="Hm. "), Delta(reasoning="Yes."), Delta(content="Hello"))
    answer = (*(Chunk("", deltas=(delta,)) for delta in deltas), Chunk("", "stop", 1, 0, 3, 2, deltas=()))
    call = (Chunk("", deltas=(Delta(tool=0, name="weather", arguments="{}"),)), Chunk("", "stop", 1, 0, 3, deltas=()))
    backend.answers += [answer, answer, call]
    whole = client.chat(MODEL, "Hi")
    assert (whole.text, whole.reasoning, whole.tool_calls) == ("Hello", "Hm. Yes.", [])
    assert (whole.usage.completion_tokens, whole.usage.reasoning_tokens) == (3, 2)
    with client.chat(MODEL, "Hi", stream=True) as stream:
        assert [piece for piece in stream if piece] == ["Hello"]
    assert (stream.text, stream.reasoning) == ("Hello", "Hm. Yes.")
    assert stream.usage is not None and stream.usage.reasoning_tokens == 2
    tool = {"type": "function", "function": {"name": "weather"}}
    called = client.chat(MODEL, "Hi", tools=[tool], tool_choice="required")
    assert (called.text, called.finish_reason) == ("", "tool_calls")
    assert called.tool_calls[0]["function"] == {"name": "weather", "arguments": "{}"}
    assert content(backend.saw("generate")[-1][-1])["tool_choice"] == "required"


def test_a_stream(client: Client) -> None:
    with client.chat(MODEL, "Hi", stream=True) as stream:
        assert list(stream) == ["Hel", "lo"]
    assert (stream.text, stream.finish_reason) == ("Hello", "stop")
    assert stream.usage is not None and stream.usage.completion_tokens == 2
    assert stream.id.startswith("chatcmpl-")


def test_completions(client: Client, backend: FakeBackend) -> None:
    assert client.complete(MODEL, [1, 2]).text == "Hello"
    assert "".join(client.complete(MODEL, "Once", stream=True)) == "Hello"
    assert [content(request) for _, request in backend.saw("generate")] == [{"prompt": [1, 2]}, {"prompt": "Once"}]


def test_embeddings(client: Client) -> None:
    embeddings = client.embed(MODEL, ["a", "b"])
    assert embeddings.vectors == [pytest.approx([0.6, -0.8])] * 2
    assert embeddings.usage.prompt_tokens == 10
    assert len(client.embed(MODEL, "a").vectors) == 1


def test_management(client: Client) -> None:
    assert client.status().gpus[0].label == "gpu0"
    assert client.health().status == "ok"
    assert client.plan(MODEL, n_ctx=64).n_ctx == 64
    assert client.plan(MODEL).n_ctx is None
    assert client.load(MODEL, n_ctx=64).n_ctx == 64
    assert client.unload(MODEL).replicas == ["r0"]
    assert client.pin(MODEL).pinned and not client.pin(MODEL, False).pinned
    assert [model.name for model in client.models()] == [MODEL, "team/big", "broken"]


def test_events(backend: FakeBackend) -> None:
    backend.news = NEWS
    with serve(backend) as url, Client(url) as client:
        assert list(client.events(follow=False)) == NEWS
        following = client.events(after=1)
        assert next(following) == NEWS[1]
        following.close()


def test_failing_health_is_an_answer(client: Client, backend: FakeBackend) -> None:
    backend.health_now = Health(status="failing", version="0.1.0", reasons=["no nodes"])
    assert client.health().reasons == ["no nodes"]
    backend.failing = Unavailable("the scheduler does not answer")
    with pytest.raises(Unavailable, match="the scheduler does not answer"):
        client.health()


def test_errors_keep_their_class_and_numbers(client: Client, backend: FakeBackend) -> None:
    for stream in (False, True):
        with pytest.raises(UnknownModel, match="'nope'"):
            client.chat("nope", "Hi", stream=stream)  # type: ignore[call-overload]
    backend.acquisitions.append(QueueFull("64 requests wait already", retry_after_s=2.5))
    with pytest.raises(QueueFull) as caught:
        client.embed(MODEL, "a")
    assert caught.value.retry_after_s == 2.5


def test_an_error_in_mid_stream_is_raised(client: Client, backend: FakeBackend) -> None:
    backend.answers.append([Chunk("Hel"), EngineFailed("the process that ran tiny ended")])
    stream = client.chat(MODEL, "Hi", stream=True)
    with pytest.raises(EngineFailed, match="the process that ran tiny ended"):
        list(stream)
    assert stream.text == "Hel"


def test_leaving_a_stream_cancels_it(client: Client, backend: FakeBackend) -> None:
    backend.answers.extend([[Chunk("Hel"), Gate()]] * 2)
    with client.chat(MODEL, "Hi", stream=True) as stream:
        assert next(iter(stream)) == "Hel"
    backend.wait_for("interrupted", 1)
    client.chat(MODEL, "Hi", stream=True).close()
    backend.wait_for("interrupted", 2)


def test_async_calls(backend: FakeBackend) -> None:
    async def scenario(client: AsyncClient) -> None:
        assert (await client.chat(MODEL, "Hi")).text == "Hello"
        async with await client.chat(MODEL, "Hi", stream=True) as stream:
            assert [piece async for piece in stream] == ["Hel", "lo"]
        assert stream.usage is not None
        assert (await client.complete(MODEL, "Once")).text == "Hello"
        assert await joined(await client.complete(MODEL, "Once", stream=True)) == "Hello"
        assert len((await client.embed(MODEL, ["a", "b"])).vectors) == 2
        assert (await client.status()).version == "0.1.0"
        assert (await client.health()).status == "ok"
        assert (await client.plan(MODEL)).verdict == "evict"
        assert (await client.load(MODEL)).model == MODEL
        assert (await client.unload(MODEL)).replicas == ["r0"]
        assert (await client.pin(MODEL)).pinned
        assert (await client.models())[0].name == MODEL
        assert [notice async for notice in client.events(follow=False)] == NEWS
        with pytest.raises(UnknownModel):
            await client.chat("nope", "Hi", stream=True)

    backend.news = NEWS
    with serve(backend) as url:
        in_async(url, scenario)


async def joined(pieces: AsyncIterator[str] | Any) -> str:
    return "".join([piece async for piece in pieces])


def test_leaving_an_async_stream_cancels_it(url: str, backend: FakeBackend) -> None:
    async def scenario(client: AsyncClient) -> None:
        async with await client.chat(MODEL, "Hi", stream=True) as stream:
            async for piece in stream:
                assert piece == "Hel"
                break
        await asyncio.to_thread(backend.wait_for, "interrupted")

    backend.answers.append([Chunk("Hel"), Gate()])
    in_async(url, scenario)


def test_nobody_listens() -> None:
    with listen("127.0.0.1", 0) as listener:
        url = url_of(listener)
    with Client(url) as client:
        for ask in (client.status, lambda: list(client.events()), lambda: client.chat("m", "Hi", stream=True)):
            with pytest.raises(Unavailable, match="`arriero up`"):
                ask()

    async def scenario(client: AsyncClient) -> None:
        for wait in (client.status(), client.chat("m", "Hi", stream=True)):
            with pytest.raises(Unavailable, match="`arriero up`"):
                await wait

    in_async(url, scenario)


def test_a_gateway_that_vanishes_in_mid_stream() -> None:
    body = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n: waiting\r\n"
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n: waiting\n\n"
    for answer, says in ((body, "broke"), (whole, "before the answer was complete")):
        with listen("127.0.0.1", 0) as listener, Client(url_of(listener)) as client:
            stream = in_background(lambda client=client: client.chat("m", "Hi", stream=True), listener, answer)
            with pytest.raises(Unavailable, match=says):
                list(stream)


def in_background(ask: Callable[[], Any], listener: Any, answer: bytes) -> Any:
    """What `ask` returns when a server that speaks only `answer`, then hangs up, sits on `listener`."""
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(answer)
        return asking.result()


def test_where_and_who_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, backend: FakeBackend) -> None:
    assert calls.http_settings(None, None)["base_url"] == "http://127.0.0.1:11535"
    with serve(backend, api_keys={"": "s3cret"}) as url:
        monkeypatch.setenv("ARRIERO_URL", url)
        monkeypatch.setenv("ARRIERO_API_KEY", "s3cret")
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        with Client() as client:
            assert client.status().version == "0.1.0"
        with Client(api_key="other") as client, pytest.raises(api.Unauthorized):
            client.status()


def test_a_proxys_page_is_an_error_too() -> None:
    error = calls.error_of(502, b"<html>Bad gateway</html>")
    assert isinstance(error, Unavailable) and "Bad gateway" in error.message


def test_a_wrong_argument_is_the_gateways_to_judge(client: Client) -> None:
    with pytest.raises(Rejected, match="n_ctx"):
        client.load(MODEL, n_ctx=-5)


def test_a_slow_answer_is_named() -> None:
    error = calls.connection_error(httpx.URL("http://box:1"), httpx.ReadTimeout("slow"))
    assert "did not answer in time" in error.message


def test_importing_the_client_is_cheap() -> None:
    heavy = ("ray", "fastapi", "starlette", "uvicorn", "llama_cpp", "numpy")
    code = f"import sys, arriero.api; from arriero import Client; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_unknown_names_are_errors() -> None:
    import arriero

    with pytest.raises(AttributeError, match="Clinet"):
        arriero.Clinet  # noqa: B018


EXAMPLES = re.findall(r"```python\n(.*?)```", (DOCS / "python_client.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_documentation_runs(example: str, url: str, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARRIERO_URL", url)
    backend.news = NEWS
    exec(compile(example, "python_client.md", "exec"), {"__name__": "example"})


def test_the_documentation_has_examples() -> None:
    assert len(EXAMPLES) >= 5
