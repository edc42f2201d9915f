"""What the tokens' road carries, and what it costs, without a model and without Ray.

Two processes: a listener whose replica says a token to every stream each turn, and a gateway. Clients stream from it. A
turn of 0 ms shows how much it carries, one of 3 ms what a token costs in both processes (user and system time).
Run: python -m benchmarks.road
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import psutil

from actors.endpoint import Endpoint
from actors.gateway.app import make_app
from actors.gateway.ray_backend import RayBackend
from actors.gateway.server import listen, make_server, url_of
from actors.leasing import Grant, TokenCounts
from actors.serving.jobs import Hearer, Job, Work
from actors.serving.listener import Listener
from actors.serving.preparation import Errand
from actors.serving.protocol import Chunk, EmbedRequest, GenerateRequest
from benchmarks.http_load import ask_all, streamed
from benchmarks.table import print_table
from scheduler.cluster.leases import Ending
from scheduler.events import RequestArrived
from scheduler.units import LeaseId, NodeId, ReplicaId, RequestId

NODE = NodeId("here")
CLIENTS = (1, 4, 8)
TURNS_S = (0.0, 0.003)
SECONDS = 6.0


class Paced:
    """A replica that says " word" to everybody in each turn."""

    def __init__(self) -> None:
        self._jobs: list[tuple[Job[Chunk], list[int]]] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def prepare(
        self, request: GenerateRequest | EmbedRequest, hearer: Hearer[Any], errand: Errand | None = None
    ) -> Job[Any]:
        assert isinstance(request, GenerateRequest) and request.max_tokens is not None
        job: Job[Any] = Job(request.lease_id, [request.max_tokens, int(request.content.split(b'"')[3])], hearer)
        return job

    def submit(self, job: Work) -> None:
        assert isinstance(job, Job)
        with self._changed:
            self._jobs.append((job, [job.prompt[0]]))
            self._changed.notify()

    def drop(self, job: Work) -> None:
        assert isinstance(job, Job)
        job.cancelled = True

    def resume(self) -> None:
        with self._changed:
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: any(not job.hearer.stalled for job, _ in self._jobs))
                jobs = [entry for entry in self._jobs if not entry[0].hearer.stalled]
            turn_s = jobs[0][0].prompt[1] / 1000
            if turn_s:
                time.sleep(turn_s)
            for entry in jobs:
                job, left = entry
                left[0] -= 1
                if left[0] and not job.cancelled:
                    job.hearer.say(Chunk(" word"))
                    continue
                job.hearer.say(Chunk(" end", "length", 1, 0, job.prompt[0]))
                job.end()
                with self._changed:
                    self._jobs.remove(entry)
            for job, _ in jobs:
                job.hearer.flush()


class Backend(RayBackend):
    """Grants everything; answers come over the road."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(None, NODE)
        self._endpoint = endpoint
        self._serial = itertools.count()

    async def acquire(self, request: RequestArrived) -> Grant:
        lease = LeaseId(f"l{next(self._serial)}")
        return Grant(lease, ReplicaId("r"), self._endpoint, request.model, 60.0, 4096)

    async def renew(self, lease_ids: Sequence[LeaseId]) -> None: ...

    async def release(self, lease_id: LeaseId, ending: Ending, usage: TokenCounts) -> None: ...

    async def cancel(self, request_id: RequestId) -> None: ...


def run_listener(told: Connection) -> None:
    listener = Listener(Paced(), NODE, "127.0.0.1")
    told.send(listener.endpoint)
    threading.Event().wait()


def run_gateway(endpoint: Endpoint, told: Connection) -> None:
    listener = listen("127.0.0.1", 0)
    server = make_server(make_app(Backend(endpoint)))
    told.send(url_of(listener))
    asyncio.run(server.serve(sockets=[listener]))


def main() -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    runner = context.Process(target=run_listener, args=[there], daemon=True)
    runner.start()
    endpoint: Endpoint = here.recv()
    gateway = context.Process(target=run_gateway, args=[endpoint, there], daemon=True)
    gateway.start()
    url = here.recv()
    processes = [psutil.Process(process.pid) for process in (runner, gateway)]
    rows = []
    for turn_s, clients in itertools.product(TURNS_S, CLIENTS):
        tokens = 2000 if not turn_s else 400
        bodies = [streamed("m", f"{turn_s * 1000:.0f}", tokens) for _ in range(clients)]
        ask_all(url, bodies, clients)
        before = [cpu_s(process) for process in processes]
        began_s = time.perf_counter()
        count, took_s = 0, 0.0
        while time.perf_counter() - began_s < SECONDS:
            answers, seconds = ask_all(url, bodies, clients)
            count, took_s = count + sum(answer.tokens for answer in answers), took_s + seconds
        spent = [cpu_s(process) - earlier for process, earlier in zip(processes, before, strict=True)]
        costs = [f"{1e3 * each / count:.3f}" for each in (*spent, sum(spent))]
        rows.append((f"{turn_s * 1e3:.0f}", str(clients), f"{count / took_s:.0f}", *costs))
    print_table(
        "The tokens' road (ms of processor time per token)",
        ("turn, ms", "clients", "tokens/s", "runner", "gateway", "together"),
        rows,
    )


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    main()
