"""A backend in plain asyncio that speaks the gateway's protocol, and a real server around it.

Every message is pickled on its way in and out, as Ray would do. What happened is in `journal`; tests wait for entries
instead of sleeping. `Gate` in a script holds an answer back until the test opens it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import pickle
import socket
import threading
from array import array
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
from fastapi import FastAPI

from actors.gateway.app import make_app
from actors.gateway.server import Server, listen, make_server, url_of
from actors.gateway.shortcut import Shortcut
from actors.leasing import Grant, TokenCounts
from actors.records import (
    AdapterInfo,
    GpuStatus,
    Health,
    LayoutShare,
    LoadResult,
    ModelInfo,
    NodeStatus,
    Notice,
    PinResult,
    Plan,
    PlanShare,
    PlanVictim,
    QueueEntry,
    ReplicaStatus,
    Status,
    UnloadResult,
)
from actors.serving.protocol import Chunk, EmbedRequest, EmbedResult, GenerateRequest
from actors.serving.replies import reply_in
from scheduler.cluster.leases import Ending
from scheduler.errors import ArrieroError, UnknownModel
from scheduler.events import RequestArrived
from scheduler.units import GIB, LeaseId, ReplicaId, RequestId

T = TypeVar("T")
PATIENCE_S = 20.0
web = httpx.Client(trust_env=False, verify=False, timeout=60.0)  # a busy machine starts processes slowly
MODEL = "tiny"


def posted(message: T) -> T:
    """`message` as it looks on the other side of a process border."""
    copy: T = pickle.loads(pickle.dumps(message))
    return copy


def content(request: GenerateRequest | EmbedRequest) -> dict[str, Any]:
    """What a request's content says."""
    said: dict[str, Any] = json.loads(request.content)
    return said


class Gate:
    """Holds a fake answer back until `open()`."""

    def __init__(self) -> None:
        self._opened: Future[None] = Future()

    def open(self) -> None:
        self._opened.set_result(None)

    async def passed(self) -> None:
        await asyncio.wrap_future(self._opened)


Step = Chunk | Gate | ArrieroError
ANSWER: tuple[Step, ...] = (Chunk("Hel"), Chunk("lo"), Chunk("", "stop", prompt_tokens=7, completion_tokens=2))
GPU = GpuStatus(
    device_id="GPU-0", node_id="n0", label="gpu0", product="RTX 3090", kind="cuda", total_bytes=24 * GIB,
    free_bytes=20 * GIB, used_bytes=4 * GIB, booked_bytes=4 * GIB, foreign_bytes=0, state="ok",
)  # fmt: skip
REPLICA = ReplicaStatus(
    replica_id="r0", model=MODEL, state="ready", node="box", layout=[LayoutShare(device="gpu0", layers=3, bytes=99)],
    n_gpu_layers=3, n_ctx=4096, slots=1, active=0, n_threads=1, idle_s=1.5,
)  # fmt: skip
NODE = NodeStatus(
    node_id="n0", hostname="box", address="127.0.0.1", memory_total_bytes=GIB, memory_available_bytes=GIB,
    memory_reserved_bytes=0, physical_cores=4, state="ok",
)  # fmt: skip


class FakeBackend:
    """Implements `Backend` with one model, `tiny`. Scripts are used up one per call, then the default applies."""

    def __init__(self, ttl_s: float = 60.0) -> None:
        self.ttl_s = ttl_s
        self.acquisitions: deque[Gate | ArrieroError] = deque()
        self.answers: deque[Sequence[Step]] = deque()
        self.embeddings: deque[EmbedResult | Gate | ArrieroError] = deque()
        self.plans: deque[Gate] = deque()
        self.news: list[Notice] = []
        self.fates: dict[str, str] = {}
        self.failing: ArrieroError | Exception | None = None
        self.health_now = Health(status="ok", version="0.1.0")
        self.journal: list[tuple[Any, ...]] = []
        self._changed = threading.Condition()

    # --- what tests ask ---

    def saw(self, what: str) -> list[tuple[Any, ...]]:
        with self._changed:
            return [entry[1:] for entry in self.journal if entry[0] == what]

    def wait_for(self, what: str, count: int = 1) -> list[tuple[Any, ...]]:
        """The entries `what`, once there are `count` of them."""
        with self._changed:
            enough = self._changed.wait_for(
                lambda: sum(entry[0] == what for entry in self.journal) >= count, PATIENCE_S
            )
        assert enough, f"no {count} {what!r} in {self.journal}"
        return self.saw(what)

    def note(self, *entry: Any) -> None:
        with self._changed:
            self.journal.append(posted(entry))
            self._changed.notify_all()

    # --- what the gateway asks ---

    async def fate(self, replica_id: ReplicaId) -> str:
        self.note("fate", replica_id)
        return self.fates.get(replica_id, "")

    async def acquire(self, request: RequestArrived) -> Grant:
        self.note("acquire", request)
        if request.model != MODEL:
            raise UnknownModel(f"no model {request.model!r} in the catalogue")
        if self.acquisitions:
            await self._step(self.acquisitions.popleft())
        number = len(self.saw("lease")) + 1
        self.note("lease", f"l{number}")
        return posted(Grant(LeaseId(f"l{number}"), ReplicaId(f"r{number}"), None, MODEL, self.ttl_s, 4096))

    async def release(self, lease_id: LeaseId, ending: Ending, usage: TokenCounts) -> None:
        self.note("release", lease_id, ending, usage)

    async def renew(self, lease_ids: Sequence[LeaseId]) -> None:
        self.note("renew", lease_ids)

    async def cancel(self, request_id: RequestId) -> None:
        self.note("cancel", request_id)

    async def generate(
        self, lease: Grant, request: GenerateRequest, shortcut: Shortcut | None = None
    ) -> AsyncGenerator[bytes | TokenCounts, None]:
        self.note("generate", lease, request)
        answer = self.answers.popleft() if self.answers else ANSWER
        ended = False
        reply = reply_in(request.reply)
        try:
            for step in answer:
                if isinstance(step, Chunk):
                    if piece := reply.bytes_of(step):
                        yield piece
                    if step.finish_reason is not None:
                        yield TokenCounts(step.prompt_tokens, step.cached_tokens, step.completion_tokens, step.pace)
                else:
                    await self._step(step)
            ended = True
        finally:
            self.note("generated" if ended else "interrupted", lease.lease_id)

    async def embed(self, lease: Grant, request: EmbedRequest) -> EmbedResult:
        self.note("embed", lease, request)
        if self.embeddings:
            step = self.embeddings.popleft()
            if isinstance(step, EmbedResult):
                return posted(step)
            await self._step(step)
        asked = content(request)
        if request.rerank:
            return posted(EmbedResult(tuple(array("f", [0.5]) for _ in asked["rerank"]["documents"]), 3))
        inputs = asked["inputs"]
        return posted(EmbedResult(tuple((0.6, -0.8) for _ in inputs), 5 * len(inputs)))

    async def status(self) -> Status:
        self._fail()
        waiting = [QueueEntry(request_id="q1", model=MODEL, waited_s=0.5, reason="loading")]
        return posted(
            Status(
                version="0.1.0", uptime_s=3.0, mode="normal", nodes=[NODE], gpus=[GPU], replicas=[REPLICA],
                queue=waiting, last_notice_seq=len(self.news),
            )
        )  # fmt: skip

    async def plan(self, model: str, n_ctx: int | None) -> Plan:
        self.note("plan", model, n_ctx)
        if self.plans:
            await self._step(self.plans.popleft())
        share = PlanShare(device="gpu0", layers=3, bytes=99, free_before_bytes=200, free_after_bytes=101)
        victim = PlanVictim(replica_id="r7", model="old", idle_s=9.0, frees={"gpu0": 50})
        return posted(Plan(model=model, verdict="evict", tier="one GPU", shares=[share], victims=[victim], n_ctx=n_ctx))

    async def load(self, request: RequestArrived) -> LoadResult:
        self._fail()
        self.note("load", request.model, request.n_ctx)
        try:
            if self.acquisitions:
                await self._step(self.acquisitions.popleft())
        except asyncio.CancelledError:
            await self.cancel(request.request_id)
            raise
        loaded = {"model": request.model, "replica_id": "r0", "node": "box", "n_ctx": request.n_ctx or 4096}
        return posted(LoadResult(**loaded, load_s=0.25))

    async def unload(self, model: str, unless_wanted: bool = False) -> UnloadResult:
        return posted(UnloadResult(model=model, replicas=["r0"]))

    async def pin(self, model: str, pinned: bool) -> PinResult:
        return posted(PinResult(model=model, pinned=pinned))

    async def keep_alive(self, model: str, keep_alive_s: float) -> None:
        self.note("keep_alive", model, keep_alive_s)

    async def models(self) -> list[ModelInfo]:
        return posted(
            [
                ModelInfo(
                    name=MODEL,
                    state="available",
                    architecture="llama",
                    n_ctx=4096,
                    modified_at_s=12.5,
                    adapters=[AdapterInfo(name="fun", scale=0.5, path="/m/fun.gguf")],
                    takes=["images"],
                ),
                ModelInfo(name="team/big", state="unknown", embeds_only=True),
                ModelInfo(name="broken", state="invalid", reason="truncated at 40"),
            ]
        )

    async def notices(self, after_seq: int) -> AsyncIterator[Notice]:
        self.note("notices", after_seq)
        for notice in self.news:
            if notice.seq > after_seq:
                yield posted(notice)

    async def health(self) -> Health:
        self._fail()
        return posted(self.health_now)

    def _fail(self) -> None:
        if self.failing is not None:
            raise posted(self.failing)

    @staticmethod
    async def _step(step: Gate | ArrieroError | EmbedResult) -> None:
        if isinstance(step, Gate):
            await step.passed()
        elif isinstance(step, ArrieroError):
            raise posted(step)


class Stage:
    """A backend that stays while the one behind it changes from test to test."""

    def __init__(self) -> None:
        self.backend = FakeBackend()
        self.url = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)


@contextmanager
def running(app: FastAPI) -> Iterator[tuple[str, Server]]:
    """The URL of a server for `app` on a real socket, in a thread of its own, and the server."""
    listener = listen("127.0.0.1", 0)
    server = make_server(app)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield url_of(listener), server
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def serve(
    backend: FakeBackend | Stage, api_keys: Mapping[str, str] | None = None, pulse_s: float = 5.0
) -> Iterator[str]:
    """The URL of a gateway over `backend`."""
    with running(make_app(backend, api_keys, pulse_s)) as (url, _):
        yield url


def connect(url: str) -> socket.socket:
    """A connection that says nothing yet."""
    address = httpx.URL(url)
    return socket.create_connection((address.host, address.port or 0), PATIENCE_S)


def head_of(path: str, length: int) -> bytes:
    """The head of a request whose body has `length` bytes."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def all_of(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            received += piece
    return received


async def asked_in_process(app: FastAPI, path: str, body: bytes, method: str = "POST") -> tuple[int, bytes]:
    """Status and body of the answer that `app` gives without a socket."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        reply = await client.request(method, path, content=body, headers={"Content-Type": "application/json"})
        return reply.status_code, reply.content
