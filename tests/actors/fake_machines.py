"""What is on the machines of `fake_ray`: cards, files, processes, and what runs inside of the actors there.

Each class in here answers as the real actor of its name does, as far as the scheduler asks it anything.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from virtual_time import now_s

from actors.devices.processes import Process
from actors.endpoint import Endpoint
from actors.serving.protocol import (
    BufferSizes,
    Introduction,
    LoadFailure,
    LoadReport,
    LoadSpec,
    RunnerState,
    RunnerStatus,
)
from scheduler.cluster.facts import DeviceFacts, DeviceReading, ModelFile, NodeFacts, NodeReading
from scheduler.costs.params import DeviceBytes, HostBytes
from scheduler.costs.shape import ModelShape
from scheduler.errors import ArrieroError
from scheduler.units import GIB, DeviceId, NodeId

LOAD_S = 1.2  # a model takes
PARK_S = 0.5

_pids = itertools.count(100)


@dataclass(eq=False)
class FakeProcess:
    """A runner's process. `obeys`: it ends by ray.kill; `mortal`: by SIGKILL. `on_end`: Ray notices."""

    process: Process
    obeys: bool = True
    mortal: bool = True
    holds: dict[DeviceId, int] = field(default_factory=dict)
    on_end: Callable[[], None] = lambda: None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def alive(self) -> bool:
        return not self.ended.is_set()

    def end(self) -> None:
        if self.alive:
            self.holds = {}
            self.ended.set()
            self.on_end()


@dataclass(eq=False)
class Machine:
    """One node: its cards, its files, what their headers say, its runners' processes, and what loads fail with."""

    node_id: NodeId
    devices: tuple[DeviceFacts, ...] = ()
    headers: dict[str, ModelShape | ArrieroError] = field(default_factory=dict)
    last_words: str = ""  # of every process that ends here
    failure: LoadFailure | None = None
    processes: dict[int, FakeProcess] = field(default_factory=dict)

    @property
    def facts(self) -> NodeFacts:
        return NodeFacts(self.node_id, f"host-{self.node_id}", "127.0.0.1", 8, 64 * GIB, self.devices)

    def read(self) -> NodeReading:
        files = tuple(ModelFile(path, (path,), 1000, 1.0) for path in self.headers)
        return NodeReading(self.node_id, 60 * GIB, now_s(), files)

    def read_device(self, device: DeviceFacts) -> DeviceReading:
        used = sum(process.holds.get(device.device_id, 0) for process in self.processes.values())
        return DeviceReading(device.device_id, device.total_bytes, device.total_bytes - used, used, now_s())


# ---------------------------------------------------------------------- what runs in the actors' processes


class FakeRunner:
    """See `RunnerActor`."""

    def __init__(self, machine: Machine) -> None:
        pid = next(_pids)
        self.body = machine.processes[pid] = FakeProcess(Process(pid, float(pid), f"/log/{pid}"))
        self._machine = machine
        self.endpoint = Endpoint(machine.node_id, f"socket-{pid}", "127.0.0.1", pid, b"secret")
        self._replica_id = ""
        self._spec: LoadSpec | None = None
        self._report: LoadReport | None = None
        self.state: RunnerState = "idle"
        self.reason = ""
        self.cancelled: list[str] = []
        self.answering: tuple[str, ...] = ()
        self._broken = asyncio.Event()
        self.saved = False

    def process(self) -> Process:
        return self.body.process

    def introduce(self) -> Introduction:
        return Introduction(self.process(), self.endpoint)

    async def load(self, replica_id: str, spec: LoadSpec) -> LoadReport | LoadFailure:
        if self.state != "idle":
            return LoadFailure("failed", f"runner of replica {self._replica_id} is {self.state}; it loads once")
        self._replica_id, self._spec, self.state = replica_id, spec, "loading"
        self.body.holds = {DeviceId(device.device_id): device.required_bytes for device in spec.devices}
        await asyncio.sleep(LOAD_S)
        if self._machine.failure is not None:
            self.break_down(self._machine.failure.message)
            return self._machine.failure
        return self.hold(replica_id, spec)

    def hold(self, replica_id: str, spec: LoadSpec) -> LoadReport:
        """It is loaded."""
        self._replica_id, self._spec, self.state = replica_id, spec, "ready"
        self.body.holds = {DeviceId(device.device_id): device.required_bytes for device in spec.devices}
        devices = tuple(DeviceBytes(device.required_bytes) for device in spec.devices)
        buffers = BufferSizes(devices, HostBytes(), spec.context.n_ctx_slot)
        self._report = LoadReport(buffers, self.body.process.pid, self.body.process.started_at_s, LOAD_S)
        return self._report

    async def park(self) -> int:
        await asyncio.sleep(PARK_S)
        self.saved = True
        return 1

    def break_down(self, reason: str) -> None:
        """It can serve no longer, but its process lives."""
        self.state, self.reason = "broken", reason
        self._broken.set()

    def progress(self) -> float:
        return 0.5

    def describe(self) -> RunnerStatus:
        return RunnerStatus(
            replica_id=self._replica_id,
            spec=self._spec,
            state=self.state,
            reason=self.reason,
            report=self._report,
            progress=1.0,
            active_requests=self.answering,
        )

    async def watch(self) -> str:
        await self._broken.wait()
        return self.reason

    def cancel(self, lease_id: str) -> bool:
        self.cancelled.append(lease_id)
        return True


class FakeNode:
    """See `NodeActor`."""

    def __init__(self, machine: Machine, scheduler: Any) -> None:
        self._machine, self._scheduler = machine, scheduler

    def report(self) -> None:
        if self._scheduler is not None:
            self._scheduler.report_node.remote(self._machine.read())

    def facts(self) -> NodeFacts:
        return self._machine.facts

    def sample_now(self) -> NodeReading:
        return self._machine.read()

    async def read_shape(
        self, path: str, adapters: Sequence[str] = (), mmproj: str = "", draft: str = ""
    ) -> ModelShape | ArrieroError:
        await asyncio.sleep(0.1)
        return self._machine.headers[path]

    async def read_ahead(self, path: str) -> None:
        await asyncio.sleep(5.0)

    def stop_reading_ahead(self) -> None: ...

    async def wait_gone(self, runners: Sequence[tuple[int, float]], timeout_s: float) -> tuple[int, ...]:
        bodies = [self._machine.processes[pid] for pid, _ in runners]
        waiting = [asyncio.ensure_future(body.ended.wait()) for body in bodies]
        await asyncio.wait(waiting, timeout=timeout_s)
        for each in waiting:
            each.cancel()
        return tuple(body.process.pid for body in bodies if body.alive)

    def kill_process(self, pid: int, started_at_s: float) -> bool:
        body = self._machine.processes[pid]
        if body.mortal:
            body.end()
        return True

    def last_words(self, runner: Process) -> str:
        return "" if self._machine.processes[runner.pid].alive else self._machine.last_words


class FakeGpu:
    """See `GpuActor`."""

    def __init__(self, machine: Machine, facts: DeviceFacts, scheduler: Any) -> None:
        self._machine, self._facts, self._scheduler = machine, facts, scheduler

    def report(self) -> None:
        if self._scheduler is not None:
            self._scheduler.report_device.remote(self.sample_now())

    def sample_now(self) -> DeviceReading:
        return self._machine.read_device(self._facts)
