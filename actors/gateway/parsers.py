"""Large bodies are read by processes of their own (`parser_process`), so that nothing in them stops the event loop.

Two processes, and the shortest body first: one that takes all its time does not keep the others waiting, and a long
prompt of some hundred kilobytes goes before the megabytes that only few send. A process that takes too long or too
much memory is ended, the client told so, and the next body gets a new one. They start when the first body needs them.
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
from pathlib import Path

from actors.gateway.errors import BodyTooLarge
from actors.gateway.limits import PARSE_CPU_S, PARSE_DATA_BYTES, PARSE_S
from actors.gateway.openai_requests import Ask, Form
from actors.gateway.parser_process import HEAD, READY, message
from scheduler.errors import ArrieroError, InvariantBroken
from scheduler.units import format_bytes

PROCESSES = 2
START_S = 60.0  # it takes 0.3 s; a machine that loads models may be slower
_SOURCE_ROOT = Path(__file__).parents[2]


@dataclass(order=True)
class _Job:
    """A body to read. Jobs are ordered by size, then as they came."""

    size_bytes: int
    number: int
    question: tuple[bytes, bytes | bytearray] = field(compare=False)
    answer: asyncio.Future[Ask] = field(compare=False)


class Parsers:
    """The processes. Belongs to one event loop; `close()` ends them."""

    def __init__(self, processes: int = PROCESSES) -> None:
        self._processes = processes
        self._jobs: asyncio.PriorityQueue[_Job] = asyncio.PriorityQueue()
        self._numbers = itertools.count()
        self._workers: list[asyncio.Task[None]] = []

    async def read_ask(self, form: Form, body: bytes | bytearray, request_id: str, key: str) -> Ask:
        """What `body` asks for, as `openai_requests.read_ask` says. Raises Rejected, BodyTooLarge for a body that takes
        too much to read."""
        if not self._workers:
            self._workers = [asyncio.ensure_future(self._work()) for _ in range(self._processes)]
        answer: asyncio.Future[Ask] = asyncio.get_running_loop().create_future()
        question = message((form, request_id, key), body)
        self._jobs.put_nowait(_Job(len(body), next(self._numbers), question, answer))
        return await answer

    def close(self) -> None:
        for worker in self._workers:
            worker.cancel()
        self._workers.clear()

    async def _work(self) -> None:
        """Keeps one process busy."""
        process: _Process | None = None
        try:
            while True:
                job = await self._jobs.get()
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
                del job, answer
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
        """Raises EOFError or OSError when the process has ended."""
        loop = asyncio.get_running_loop()
        for piece in question:
            await loop.sock_sendall(self._socket, piece)
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
