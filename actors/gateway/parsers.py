"""Large bodies are read by processes of their own (`parser_process`), so that nothing in them stops the event loop.

Two processes, so that one body that takes all its time does not keep the others waiting: one of them reads no long
bodies. The sources (API keys, or
addresses) take turns. Of one source, short bodies go first, but a long one does not wait for ever: each megabyte counts
as a second of waiting. A process that takes too long or too much memory is ended, the client is told so, and the next
body gets a new one. The processes start when the first body needs them.
"""

from __future__ import annotations

import asyncio
import itertools
import pickle
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from pathlib import Path

from actors.gateway.errors import BodyTooLarge
from actors.gateway.forms import Form
from actors.gateway.limits import PARSE_CPU_S, PARSE_DATA_BYTES, PARSE_S
from actors.gateway.openai_requests import Ask
from actors.gateway.parser_process import HEAD, READY, message
from scheduler.errors import ArrieroError, InvariantBroken
from scheduler.units import KIB, MIB, format_bytes

PROCESSES = 2
LONG_BYTES = 256 * KIB
"""32 MiB may take `PARSE_CPU_S`; so much is a hundredth of it."""
LOOK_EVERY_S = 0.5  # a process that has stood still between two looks will not answer
START_S = 60.0  # it takes 0.3 s; a machine that loads models may be slower
_SOURCE_ROOT = Path(__file__).parents[2]


BYTES_PER_S = MIB
"""So much more of a body counts as a second later. A guess: most bodies are some kilobytes."""


@dataclass(order=True)
class _Job:
    """A body to read. Jobs of one source are ordered by `due_s`, then as they came."""

    due_s: float
    number: int
    size_bytes: int = field(compare=False)
    question: tuple[bytes, bytes | bytearray] = field(compare=False)
    answer: asyncio.Future[Ask] = field(compare=False)

    @property
    def is_long(self) -> bool:
        return self.size_bytes > LONG_BYTES


class Parsers:
    """The processes. Belongs to one event loop; `close()` ends them."""

    def __init__(self, processes: int = PROCESSES) -> None:
        self._processes = processes
        self._lines: dict[str, list[_Job]] = {}  # a heap for each source; the source whose turn is next comes first
        self._long = 0  # long bodies that are being read
        self._changed = asyncio.Condition()
        self._numbers = itertools.count()
        self._workers: list[asyncio.Task[None]] = []

    async def read_ask(self, form: Form, body: bytes | bytearray, request_id: str, key: str, source: str = "") -> Ask:
        """What `body` asks for, as `forms.read_ask` says. Raises Rejected, BodyTooLarge for a body that takes
        too much to read."""
        if not self._workers:
            self._workers = [asyncio.ensure_future(self._work()) for _ in range(self._processes)]
        answer: asyncio.Future[Ask] = asyncio.get_running_loop().create_future()
        question = message((form, request_id, key), body)
        due_s = asyncio.get_running_loop().time() + len(body) / BYTES_PER_S
        job = _Job(due_s, next(self._numbers), len(body), question, answer)
        async with self._changed:
            heappush(self._lines.setdefault(source, []), job)
            self._changed.notify()
        try:
            return await answer
        finally:
            job.question = (b"", b"")  # whoever has left holds no bytes in the line

    async def _next(self) -> _Job:
        async with self._changed:
            while (source := next(filter(self._may_be_next, self._lines), None)) is None:
                await self._changed.wait()
            line = self._lines.pop(source)
            job = heappop(line)
            if line:
                self._lines[source] = line  # behind all others
            self._long += job.is_long
            return job

    def _may_be_next(self, source: str) -> bool:
        return not self._lines[source][0].is_long or self._long < max(1, self._processes - 1)

    async def _ended(self, job: _Job) -> None:
        async with self._changed:
            self._long -= job.is_long
            self._changed.notify_all()

    def close(self) -> None:
        for worker in self._workers:
            worker.cancel()
        self._workers.clear()

    async def _work(self) -> None:
        """Keeps one process busy."""
        process: _Process | None = None
        try:
            while True:
                job = await self._next()
                try:
                    if job.answer.done():  # whoever asked has left
                        continue
                    try:
                        process = process or await _Process.start()
                        answer: Ask | ArrieroError = await asyncio.wait_for(process.ask(job.question), PARSE_S)
                    except (asyncio.TimeoutError, OSError, EOFError) as error:
                        status = await process.end() if process is not None else None
                        answer = _trouble(status, error, job)
                        process = None
                    if job.answer.done():
                        continue
                    if isinstance(answer, ArrieroError):
                        job.answer.set_exception(answer)
                    else:
                        job.answer.set_result(answer)
                    del answer
                finally:
                    await self._ended(job)
                    del job
        finally:
            if process is not None:
                process.end()


def _trouble(status: int | None, error: Exception, job: _Job) -> ArrieroError:
    """What became of a body whose process ended with the exit status `status` (None: it did not start)."""
    if status is None:
        return InvariantBroken(f"the process that reads large requests cannot start: {error!r}")
    if isinstance(error, asyncio.TimeoutError):
        limit = f"{PARSE_S:g} s"
    elif status == -signal.SIGXCPU:
        limit = f"{PARSE_CPU_S} s of processor time"
    else:
        limit = f"{format_bytes(PARSE_DATA_BYTES)} of memory"
    size = format_bytes(job.size_bytes)
    return BodyTooLarge(f"reading the body ({size}) took more than {limit}; send fewer or simpler values")


class _Process:
    """One process, and the socket to talk to it. Nothing large is copied on the way but once."""

    def __init__(self, child: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self._child = child
        self._socket = connection

    @classmethod
    async def start(cls) -> _Process:
        """Raises OSError or EOFError when it does not start."""
        ours, its = socket.socketpair()
        ours.setblocking(False)
        with its:
            child = subprocess.Popen(
                [sys.executable, "-m", "actors.gateway.parser_process"],
                stdin=its.fileno(),
                stdout=subprocess.DEVNULL,
                cwd=_SOURCE_ROOT,  # "-m" looks here first, wherever this process was started
            )
        process = cls(child, ours)
        try:
            await asyncio.wait_for(process._receive(len(READY)), START_S)
        except BaseException:
            process.end()
            raise
        return process

    async def ask(self, question: tuple[bytes, bytes | bytearray]) -> Ask | ArrieroError:
        """Raises EOFError or OSError when the process has ended, or waits for itself: where no memory is left, a
        library may fail while it says so, and never come back."""
        loop = asyncio.get_running_loop()
        for piece in question:
            await loop.sock_sendall(self._socket, piece)
        answer, before = asyncio.ensure_future(self._answer()), ""
        try:
            while not (await asyncio.wait({answer}, timeout=LOOK_EVERY_S))[0]:
                at_rest = self._rests_at()
                if at_rest and at_rest == before:
                    raise EOFError("it neither computes nor ends")
                before = at_rest
            return answer.result()
        finally:
            answer.cancel()

    def _rests_at(self) -> str:
        """The processor time that it has used, if it sleeps; else ""."""
        try:
            stat = Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return ".".join(stat[11:13]) if stat[0] == "S" else ""

    async def _answer(self) -> Ask | ArrieroError:
        small, large = HEAD.unpack(await self._receive(HEAD.size))
        answer: Ask | ArrieroError = pickle.loads(await self._receive(small))
        content = await self._receive(large)
        if isinstance(answer, ArrieroError):
            return answer
        return replace(answer, request=replace(answer.request, content=bytes(content)))

    async def _receive(self, n_bytes: int) -> bytearray:
        data = bytearray(n_bytes)
        left = memoryview(data)
        while left:
            received = await asyncio.get_running_loop().sock_recv_into(self._socket, left)
            if not received:
                raise EOFError("the process has ended")
            left = left[received:]
        return data

    def end(self) -> asyncio.Future[int]:
        """End it, whatever it does; its exit status, once it is gone."""
        self._socket.close()
        self._child.kill()
        # To give back its memory takes the kernel up to a tenth of a second: not on the event loop.
        return asyncio.get_running_loop().run_in_executor(None, self._child.wait)
