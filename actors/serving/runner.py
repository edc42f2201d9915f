"""A replica in its own process: it checks the memory, loads, serves, and frees everything when it ends.

`Runner` is the logic, free of Ray; `RunnerActor` is the detached actor around it. It starts without a model, loads
once, and is never restarted. Requests come through its `Listener`.
States: idle → loading → ready → broken or closed; a failed load ends in broken. If llama.cpp aborts, only this process
ends. The normal end is `ray.kill`: device processes and memory go with the process.
Expected failures are values (`LoadFailure`): an exception that crosses Ray gains a traceback and loses its class.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import Any, TypeVar

import ray

from actors.devices.cores import Cores
from actors.devices.host import memory_available_bytes
from actors.devices.nvml import read_gpu
from actors.devices.processes import Process, this_process
from actors.devices.pulse import sign_in
from actors.devices.reporting import every
from actors.devices.virtual import DeviceProcess, read_virtual_gpu, start_device_process
from actors.serving.beat import Beat, Beats
from actors.serving.engine import Engine
from actors.serving.jobs import Hearer, Work
from actors.serving.listener import Listener
from actors.serving.preflight import PreflightUnavailable, ask_llama_cpp, check_prediction
from actors.serving.preparation import Errand, Preparer
from actors.serving.protocol import (
    EmbedRequest,
    GenerateRequest,
    Introduction,
    LoadDevice,
    LoadFailed,
    LoadFailure,
    LoadReport,
    LoadSpec,
    RunnerState,
    RunnerStatus,
)
from actors.serving.visible import show_only
from scheduler.cluster.facts import DeviceFacts, DeviceReading
from scheduler.errors import EngineFailed
from scheduler.units import DeviceId, NodeId, format_bytes

Result = TypeVar("Result")
EngineLoader = Callable[[LoadSpec, Sequence[str], Callable[[float], object]], Engine]

log = logging.getLogger(__name__)

QUESTIONS = 6
"""Ray calls at once: a runner must answer while it loads and while it is watched."""

WATCH_EVERY_S = 0.25

TURN_EVERY_S, TURN_WITHIN_S = 1.0, 60.0
"""A Python thread that gets no turn within this time waits for a lock that is never released."""

IMPORTED_EARLY = "llama_cpp"
"""Its import takes longer than all other Python work of a load. It does not look for GPUs yet."""


def load_on_its_devices(
    spec: LoadSpec,
    endpoints: Sequence[str],
    on_progress: Callable[[float], object],
    *,
    beats: Beats,
    node_id: str,
    preparer: Preparer,
) -> Engine:
    """An engine that sees the spec's cards and no others, and shares the node's cores where it computes on them."""
    show_only(spec.devices)
    cores = Cores.on_node(node_id, spec.n_threads) if spec.n_threads > 1 else Cores.alone(1)
    return Engine(spec, endpoints, on_progress, beats, cores, preparer)


class Runner:
    """One replica. `load` once, then `prepare` and `submit` requests from any number of threads."""

    def __init__(self, load_engine: EngineLoader = Engine) -> None:
        self._load_engine = load_engine
        self._replica_id = ""
        self._spec: LoadSpec | None = None
        self._engine: Engine | None = None
        self._devices: list[DeviceProcess] = []
        self._lock = Lock()
        self._state: RunnerState = "idle"
        self._reason = ""
        self._progress = 0.0
        self._report: LoadReport | None = None
        self._watcher = object()

    def load(self, replica_id: str, spec: LoadSpec) -> LoadReport | LoadFailure:
        """Loads the model; blocks until it can answer. A refusal names the numbers and has loaded nothing."""
        with self._lock:
            if self._state != "idle":
                return LoadFailure("failed", f"runner of replica {self._replica_id} is {self._state}; it loads once")
            self._replica_id, self._spec, self._state = replica_id, spec, "loading"
        started = time.monotonic()
        try:
            check_memory(spec)
            if spec.preflight:
                preflight(spec)
            self._start_devices(spec)
            self._engine = self._load_engine(spec, [device.endpoint for device in self._devices], self._advance)
        except LoadFailed as error:
            return self._load_failed(error.failure)
        except Exception as error:  # of any kind: the scheduler must hear of it, and this replica has failed
            return self._load_failed(LoadFailure("failed", f"{type(error).__name__}: {error}"))
        process = this_process()
        took_s = time.monotonic() - started
        self._report = LoadReport(self._engine.buffers, process.pid, process.started_at_s, load_s=took_s)
        self._progress, self._state = 1.0, "ready"
        return self._report

    def _advance(self, progress: float) -> None:
        self._progress = min(progress, 0.99)  # complete only when the context exists too

    def _start_devices(self, spec: LoadSpec) -> None:
        virtual = [device for device in spec.devices if device.kind == "rpc"]
        if virtual:
            with ThreadPoolExecutor(len(virtual)) as pool:
                started = [
                    pool.submit(start_device_process, device.state_path, device.total_bytes) for device in virtual
                ]
            self._devices = [future.result() for future in started if future.exception() is None]
            for future in started:
                future.result()

    def _load_failed(self, failure: LoadFailure) -> LoadFailure:
        self._state, self._reason = "broken", failure.message
        self._close_devices()
        return failure

    def _close_devices(self) -> None:
        for device in self._devices:
            device.close()
        self._devices = []

    def progress(self) -> float:
        """How much of the load is done, 0 to 1."""
        return self._progress

    def prepare(
        self, request: GenerateRequest | EmbedRequest, hearer: Hearer[Any], errand: Errand | None = None
    ) -> Work:
        """The work that `request` makes: see `Engine.prepare`. Raises ArrieroError."""
        return self._ready_engine().prepare(request, hearer, errand)

    def submit(self, job: Work) -> None:
        """Queues `job`. Raises EngineFailed, and has closed it, when that cannot be."""
        try:
            engine = self._ready_engine()
        except EngineFailed:
            job.close()
            raise
        engine.submit(job)

    def drop(self, job: Work) -> None:
        """Ends `job` within one token; nothing happens if it has ended already."""
        if self._engine is not None:
            self._engine.drop(job)

    def resume(self) -> None:
        """A hearer that was stalled takes chunks again."""
        if self._engine is not None:
            self._engine.resume()

    def cancel(self, lease_id: str) -> bool:
        """Ends a request that runs or waits here, in the middle of its prompt too. False when there is none."""
        return self._engine is not None and self._engine.cancel(lease_id)

    def describe(self) -> RunnerStatus:
        """All that a scheduler needs to take this replica into its books; notices a device that died."""
        self._check_devices()
        return RunnerStatus(
            replica_id=self._replica_id,
            spec=self._spec,
            state=self._state,
            reason=self._reason,
            report=self._report,
            progress=self._progress,
            active_requests=self._engine.active_requests if self._engine is not None else (),
        )

    def watch(self) -> str:
        """Returns, with the reason, once a ready replica can serve no longer.

        The latest call watches and ends those before it: a scheduler that restarts leaves no threads behind here.
        """
        mine = self._watcher = object()
        while self._watcher is mine:
            if self.describe().state != "ready":
                return self._reason or self._state
            time.sleep(WATCH_EVERY_S)
        return "another call watches"

    def park(self) -> int:
        """Saves conversations, see `Engine.park`; this replica serves no longer. Returns how many were saved."""
        if self._state != "ready" or self._engine is None:
            return 0
        self._state, self._reason = "closed", "it was stopped"
        return self._engine.park()

    def close(self) -> None:
        """Frees model, context and devices while the process lives on. Safe to call twice."""
        if self._engine is not None:
            self._engine.close()
        self._close_devices()
        self._state = "closed"

    def _ready_engine(self) -> Engine:
        self._check_devices()
        if self._state != "ready" or self._engine is None:
            what = "this runner" if self._spec is None else f"replica {self._replica_id} of {self._spec.model}"
            raise EngineFailed(f"{what} is {self._state} {self._reason}".rstrip())
        return self._engine

    def _check_devices(self) -> None:
        """A dead device would end this process at the next token. So the replica is marked as broken before that."""
        if self._state != "ready" or self._engine is None:
            return
        dead = [device.pid for device in self._devices if not device.alive()]
        if dead:
            self._state, self._reason = "broken", f"its device process {dead[0]} has ended"
        elif self._engine.broken:
            self._state, self._reason = "broken", self._engine.broken


def check_memory(spec: LoadSpec) -> None:
    """Raises LoadFailed("refused") when live memory is below what the ledger reserved, on any device or the host."""
    for device in spec.devices:
        reading = _read_device(device)
        if reading.lost_reason:
            raise LoadFailed("refused", f"{device.device_id} cannot be used: {reading.lost_reason}")
        if reading.free_bytes < device.required_bytes:
            raise LoadFailed(
                "refused",
                f"{device.device_id} has {format_bytes(reading.free_bytes)} free ({reading.free_bytes} bytes); "
                f"{spec.model} needs {format_bytes(device.required_bytes)} ({device.required_bytes} bytes) there",
            )
    available_bytes = memory_available_bytes()
    if available_bytes < spec.host_required_bytes:
        raise LoadFailed(
            "refused",
            f"the host has {format_bytes(available_bytes)} of memory available; "
            f"{spec.model} needs {format_bytes(spec.host_required_bytes)} there",
        )


def preflight(spec: LoadSpec) -> None:
    """Raises LoadFailed where llama.cpp says that this load would take more than was reserved, or end the process."""
    try:
        check_prediction(spec, ask_llama_cpp(spec))
    except PreflightUnavailable as reason:
        log.warning("%s is loaded without a pre-flight: %s", spec.model, reason)


def _read_device(device: LoadDevice) -> DeviceReading:
    if device.kind == "cuda":
        return read_gpu(device.device_id)
    facts = DeviceFacts(
        device_id=DeviceId(device.device_id),
        node_id=NodeId(""),  # this one, whatever its name
        label="",
        product="",
        kind="rpc",
        total_bytes=device.total_bytes,
        state_path=device.state_path,
    )
    return read_virtual_gpu(facts)


@ray.remote(num_cpus=0, max_restarts=0, max_concurrency=QUESTIONS)
class RunnerActor:
    """A `Runner` as a Ray actor. Name it `runner-…`, detached, on its node by hard affinity.

    Ray starts it, loads it and asks how it is; requests come to its `Listener`.
    """

    def __init__(self) -> None:
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # or ggml starts a debugger before it ends the process
        node_id = ray.get_runtime_context().get_node_id()
        self._turns = sign_in(node_id, "RunnerActor", "a turn of its threads")
        every(TURN_EVERY_S, partial(self._turns.promise, TURN_WITHIN_S), "tell the node of it")
        decodes = sign_in(node_id, "RunnerActor", "a decode")
        encodings = sign_in(node_id, "RunnerActor", "the encoding of a picture or sound")
        beats = Beats(Beat(decodes.promise, decodes.rest), Beat(encodings.promise, encodings.rest))
        self._runner = Runner(partial(load_on_its_devices, beats=beats, node_id=node_id, preparer=Preparer()))
        self._listener = Listener(self._runner, NodeId(node_id), ray.util.get_node_ip_address())
        importlib.import_module(IMPORTED_EARLY)

    def load(self, replica_id: str, spec: LoadSpec) -> LoadReport | LoadFailure:
        return self._runner.load(replica_id, spec)

    def progress(self) -> float:
        return self._runner.progress()

    def cancel(self, lease_id: str) -> bool:
        return self._runner.cancel(lease_id)

    def describe(self) -> RunnerStatus:
        return self._runner.describe()

    def watch(self) -> str:
        """Returns the reason when the replica breaks; fails with the actor when its process ends."""
        return self._runner.watch()

    def park(self) -> int:
        return self._runner.park()

    def process(self) -> Process:
        """See `this_process`. Newer versions ask for it when they take this one down: it must not be removed."""
        return this_process()

    def introduce(self) -> Introduction:
        """Answers at once."""
        return Introduction(this_process(), self._listener.endpoint)
