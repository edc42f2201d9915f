"""One HTTP call: how it is asked and how its answer is read, for the sync and the async client alike.

A `Call` knows its method, path and body, and turns the answer's bytes into a typed result. The clients add only the
waiting. Nothing here does I/O.
"""

from __future__ import annotations

import json
import os
import sys
from array import array
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypedDict, TypeVar

import httpx
from pydantic import TypeAdapter

from actors.gateway.address import DEFAULT_PORT, is_loopback
from actors.gateway.errors import error_from_body
from actors.records import (
    Answer,
    Embeddings,
    Health,
    LoadResult,
    ModelInfo,
    Notice,
    PinResult,
    Plan,
    Status,
    UnloadResult,
    Usage,
)
from scheduler.errors import ArrieroError, Rejected, Unavailable

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Messages = str | Sequence[Mapping[str, Any]]

CONNECT_S = 5.0
QUICK_S = 60.0
"""Read time-out of quick calls; what may wait for a cold load has none, because loads take what they take."""

_MODELS = TypeAdapter(list[ModelInfo])


class Options(TypedDict, total=False):
    """What a chat or completion may set; everything left out is the gateway's default (see docs/http_api.md)."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: str | Sequence[str]
    logit_bias: Mapping[int, float]
    response_format: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]]
    tool_choice: str | Mapping[str, Any]
    parallel_tool_calls: bool
    reasoning_effort: str
    chat_template_kwargs: Mapping[str, Any]
    n_ctx: int
    deadline_s: float
    priority: int


@dataclass(frozen=True, slots=True)
class Call(Generic[T_co]):
    """`read` gets the body of a 2xx answer. `patient` calls wait as long as it takes."""

    method: str
    path: str
    read: Callable[[bytes], T_co]
    body: Mapping[str, Any] | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    patient: bool = False
    also_reads: int = 0  # one more status whose body is an answer

    def result(self, status: int, body: bytes) -> T_co:
        """Raises the ArrieroError that the gateway answered with."""
        if 200 <= status < 300 or (status == self.also_reads and b'"error"' not in body):
            return self.read(body)
        raise error_of(status, body)


# --- where ------------------------------------------------------------------------------------------------------


def http_settings(base_url: str | None, api_key: str | None) -> dict[str, Any]:
    """Keyword arguments of httpx's clients."""
    url = base_url or os.environ.get("ARRIERO_URL") or f"http://127.0.0.1:{DEFAULT_PORT}"
    try:
        host = httpx.URL(url).host
    except (httpx.InvalidURL, ValueError, TypeError) as error:
        raise Rejected(
            f"{url!r} is not the URL of an Arriero gateway, such as http://127.0.0.1:{DEFAULT_PORT}: {error}"
        ) from None
    key = api_key or os.environ.get("ARRIERO_API_KEY")
    if key and not (key.isascii() and key.isprintable()):
        raise Rejected("this API key cannot be sent: use printable ASCII characters only")
    return {
        "base_url": url,
        "headers": {"Authorization": f"Bearer {key}"} if key else {},
        "timeout": httpx.Timeout(QUICK_S, connect=CONNECT_S),
        # A proxy from the environment cannot reach this machine's own loopback.
        "trust_env": not is_loopback(host),
        # Without TLS there is nothing to verify, and reading the certificate store costs every command 50 ms.
        "verify": url.startswith("https:"),
    }


def request_of(call: Call[Any], http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
    timeout = httpx.Timeout(None, connect=CONNECT_S) if call.patient else http.timeout
    return http.build_request(call.method, call.path, json=call.body, params=call.query, timeout=timeout)


def connection_error(base_url: httpx.URL, error: httpx.TransportError) -> Unavailable:
    """What a failed connection means, and what to do about it."""
    url = str(base_url).rstrip("/")
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        return Unavailable(f"no Arriero answers at {url}; start it with `arriero up`, or set ARRIERO_URL ({error})")
    if isinstance(error, httpx.TimeoutException):
        return Unavailable(f"Arriero at {url} did not answer in time ({type(error).__name__})")
    return Unavailable(f"the connection to Arriero at {url} broke ({type(error).__name__}: {error}); try again")


def error_of(status: int, body: bytes) -> ArrieroError:
    try:
        return error_from_body(json.loads(body), status)
    except ValueError:
        return error_from_body(body.decode(errors="replace"), status)


# --- calls ------------------------------------------------------------------------------------------------------


def chat(model: str, messages: Messages, stream: bool, options: Options) -> Call[Answer]:
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(turn) for turn in messages]
    return _generation("/v1/chat/completions", model, {"messages": turns}, stream, options)


def complete(model: str, prompt: str | Sequence[int], stream: bool, options: Options) -> Call[Answer]:
    text_or_tokens = prompt if isinstance(prompt, str) else list(prompt)
    return _generation("/v1/completions", model, {"prompt": text_or_tokens}, stream, options)


def _generation(path: str, model: str, body: dict[str, Any], stream: bool, options: Options) -> Call[Answer]:
    body |= {"model": model, **options}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return Call("POST", path, _read_answer, body, patient=True)


def embed(model: str, inputs: str | Sequence[str] | Sequence[Sequence[int]]) -> Call[Embeddings]:
    body = {"model": model, "input": inputs if isinstance(inputs, str) else list(inputs), "encoding_format": "base64"}
    return Call("POST", "/v1/embeddings", _read_embeddings, body, patient=True)


def models() -> Call[list[ModelInfo]]:
    return Call("GET", "/api/v1/models", _MODELS.validate_json)


def status() -> Call[Status]:
    return Call("GET", "/api/v1/status", Status.model_validate_json)


def health() -> Call[Health]:
    return Call("GET", "/api/v1/health", Health.model_validate_json, also_reads=503)


def plan(model: str, n_ctx: int | None) -> Call[Plan]:
    query = {"model": model} | ({} if n_ctx is None else {"n_ctx": str(n_ctx)})
    return Call("GET", "/api/v1/plan", Plan.model_validate_json, query=query)


def load(model: str, n_ctx: int | None) -> Call[LoadResult]:
    return _order("load", {"model": model, "n_ctx": n_ctx}, LoadResult.model_validate_json)


def unload(model: str) -> Call[UnloadResult]:
    return _order("unload", {"model": model}, UnloadResult.model_validate_json)


def pin(model: str, pinned: bool) -> Call[PinResult]:
    return _order("pin", {"model": model, "pinned": pinned}, PinResult.model_validate_json)


def _order(name: str, body: Mapping[str, Any], read: Callable[[bytes], T]) -> Call[T]:
    return Call("POST", f"/api/v1/{name}", read, body, patient=True)


def events(after: int, follow: bool) -> Call[Notice]:
    query = {"after": str(after), "follow": str(follow).lower()}
    return Call("GET", "/api/v1/events", Notice.model_validate_json, query=query, patient=True)


# --- answers ----------------------------------------------------------------------------------------------------


def _read_answer(body: bytes) -> Answer:
    reply = json.loads(body)
    choice = reply["choices"][0]
    message = choice.get("message") or {"content": choice.get("text")}
    return Answer(
        id=reply["id"],
        model=reply["model"],
        text=message["content"] or "",
        finish_reason=choice["finish_reason"],
        usage=_usage(reply["usage"]),
        reasoning=message.get("reasoning_content") or "",
        tool_calls=message.get("tool_calls") or [],
    )


def _read_embeddings(body: bytes) -> Embeddings:
    reply = json.loads(body)
    vectors = [_floats(item["embedding"]) for item in reply["data"]]
    return Embeddings(model=reply["model"], vectors=vectors, usage=_usage(reply["usage"]))


def _usage(wire: Mapping[str, Any]) -> Usage:
    return Usage(
        prompt_tokens=wire["prompt_tokens"],
        cached_tokens=(wire.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        completion_tokens=wire.get("completion_tokens", 0),
        reasoning_tokens=(wire.get("completion_tokens_details") or {}).get("reasoning_tokens", 0),
    )


def _floats(text: str) -> list[float]:
    floats = array("f", b64decode(text))
    if sys.byteorder == "big":
        floats.byteswap()
    return floats.tolist()


class Progress:
    """A streamed answer so far. `usage` and `finish_reason` come with its end."""

    def __init__(self) -> None:
        self.id = ""
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self._ended = False
        self._texts: list[str] = []
        self._thoughts: list[str] = []

    @property
    def text(self) -> str:
        """All the text so far."""
        return "".join(self._texts)

    @property
    def reasoning(self) -> str:
        """All that the model has thought so far, apart from its text."""
        return "".join(self._thoughts)

    def feed(self, line: str) -> str:
        """The text that a line of the event stream adds, often none. Raises the ArrieroError that the gateway sent."""
        data = data_of(line)
        if data is None:
            return ""
        if data == "[DONE]":
            self._ended = True
            return ""
        reply = json.loads(data)
        self.id = reply["id"]
        if reply.get("usage"):
            self.usage = _usage(reply["usage"])
        if not reply["choices"]:
            return ""
        choice = reply["choices"][0]
        self.finish_reason = choice["finish_reason"] or self.finish_reason
        delta = choice.get("delta") or {"content": choice.get("text")}
        text: str = delta.get("content") or ""
        self._texts.append(text)
        self._thoughts.append(delta.get("reasoning_content") or "")
        return text

    def check_end(self) -> None:
        """Raises Unavailable for a stream that stopped in the middle."""
        if not self._ended:
            raise Unavailable("the gateway ended the stream before the answer was complete; try again")


def data_of(line: str) -> str | None:
    """The data of an event-stream line; None for comments, ids and blank lines. Raises the error that it carries."""
    if not line.startswith("data: "):
        return None
    data = line[len("data: ") :]
    if data.startswith('{"error"'):
        raise error_from_body(json.loads(data), 500)
    return data
