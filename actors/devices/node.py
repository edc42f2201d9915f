"""One actor per node: it knows the machine's resources and model files, and looks after its processes.

It tells its facts once, then reports available memory and model files every second. Another thread searches the disks
every ten seconds, or less often where a search takes long, so that a slow disk delays nothing else. It reads GGUF
headers for the scheduler. It waits for processes to end, kills a runner that Ray could not kill, ends processes that
hang (`watchdog`), and says why a runner died.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.devices import host, processes
from actors.devices.byte_count import Holder
from actors.devices.files import find_models, parts_of
from actors.devices.last_words import last_words
from actors.devices.nvml import list_gpus, unavailable_reason
from actors.devices.rates import cpu_rates
from actors.devices.reporting import Reporter, every
from actors.devices.virtual import create_virtual_gpus, virtual_gpu_holders
from actors.devices.watchdog import LOOK_EVERY_S, Watchdog
from actors.measurements import llama_build
from scheduler.cluster.facts import DeviceFacts, ModelFile, NodeFacts, NodeReading
from scheduler.costs.adapter import read_adapter
from scheduler.costs.companions import Companions, accompanied
from scheduler.costs.projector import Projector, read_projector
from scheduler.costs.shape import ModelShape, read_shape
from scheduler.errors import ArrieroError, InvalidGGUF, Rejected
from scheduler.units import MIB, NodeId

log = logging.getLogger(__name__)

REPORT_S = 1.0
SEARCH_S = 10.0
READ_AHEAD_BYTES = 8 * MIB
_FIRST_SEARCH_S = 5.0
_RUNNER_TITLE = processes.ray_title("RunnerActor")


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """A node's settings: where models are (folders, files, globs) and what to use instead of real GPUs.

    `virtual_gpus`: capacities in bytes; none means the machine's own cards. `state_directory`: a folder on the node
    for the counts of virtual GPUs.
    """

    model_paths: tuple[str, ...] = ()
    virtual_gpus: tuple[int, ...] = ()
    state_directory: str = ""


class NodeMonitor:
    """The node, free of Ray. `report` takes a reading and says whether it was sent."""

    def __init__(
        self, node_id: NodeId, settings: NodeSettings, report: Callable[[NodeReading], bool], *, address: str
    ) -> None:
        self._settings, self._report = settings, report
        self._files: tuple[ModelFile, ...] = ()
        self._searched = threading.Event()
        self._reads_ahead = threading.Event()
        self._shapes: dict[object, tuple[object, ModelShape | ArrieroError]] = {}
        self.facts = NodeFacts(
            node_id=node_id,
            hostname=socket.gethostname(),
            address=address,
            physical_cores=host.physical_cores(),
            memory_total_bytes=host.memory_total_bytes(),
            devices=self._devices(node_id),
            rates=cpu_rates(host.physical_cores()),
            llama_build=llama_build(),
        )

    def search(self) -> None:
        """Look for model files; the next reading has them."""
        self._files = find_models(self._settings.model_paths)
        self._searched.set()

    def sample(self) -> NodeReading:
        """Read the node and report it. The first time, `search` is given some seconds to find the models."""
        self._searched.wait(_FIRST_SEARCH_S)
        reading = NodeReading(self.facts.node_id, host.memory_available_bytes(), time.time(), self._files)
        self._report(reading)
        return reading

    def read_shape(
        self, path: str, adapters: Sequence[str] = (), mmproj: str = "", draft: str = ""
    ) -> ModelShape | ArrieroError:
        """The shape of the model with the adapters, the projector and the draft that come with it, or why it has none
        (InvalidGGUF: never usable; Rejected: not readable here).

        Remembered until the size or the modification time of a file changes.
        """
        files = (path, *adapters, *filter(None, (mmproj, draft)))
        try:
            parts = [part.stat() for file in files for part in parts_of(Path(file))]
            stamp = [(part.st_size, part.st_mtime_ns) for part in parts]
            key = path, tuple(adapters), mmproj, draft
            known = self._shapes.get(key)
            if known is None or known[0] != stamp:
                known = self._shapes[key] = (stamp, _shape_or_fault(path, adapters, mmproj, draft))
            return known[1]
        except OSError as error:
            where = error.filename or path
            return Rejected(f"{where} cannot be read on {self.facts.hostname}: {error.strerror}", path=path)

    def read_ahead(self, path: str) -> None:
        """Read the model's parts into the page cache, unless `stop_reading_ahead` is called. Raises OSError."""
        self._reads_ahead.set()
        for part in parts_of(Path(path)):
            with part.open("rb", buffering=0) as file:
                while self._reads_ahead.is_set() and file.read(READ_AHEAD_BYTES):
                    pass

    def stop_reading_ahead(self) -> None:
        """A load needs the disk."""
        self._reads_ahead.clear()

    def wait_gone(self, runners: Sequence[tuple[int, float]], timeout_s: float) -> tuple[int, ...]:
        """Block until every runner (pid, started_at_s) has ended, `timeout_s` seconds at most; the pids still there.

        The caller has told them to end. One that is stopped cannot obey, and is killed at once. A runner's device
        processes on virtual GPUs end a moment later. They are waited for too, so that the next reading shows their
        memory as free.
        """
        deadline = time.monotonic() + timeout_s
        for pid, started_at_s in runners:
            if (look := processes.look_at(pid)) is not None and look.stopped:
                processes.kill_process(pid, started_at_s, titled=_RUNNER_TITLE)
        left = processes.wait_gone(runners, timeout_s)
        if left:
            return left
        owners = {pid for pid, _ in runners}
        orphans = [
            (holder.pid, holder.started_at_s) for holder in self.device_processes() if holder.owner_pid in owners
        ]
        return processes.wait_gone(orphans, max(0.0, deadline - time.monotonic()))

    def device_processes(self) -> Iterator[Holder]:
        """The live device processes of all virtual GPUs."""
        return (holder for device in self.facts.devices for holder in virtual_gpu_holders(device))

    def _devices(self, node_id: NodeId) -> tuple[DeviceFacts, ...]:
        if self._settings.virtual_gpus:
            return create_virtual_gpus(node_id, self._settings.virtual_gpus, self._settings.state_directory)
        return list_gpus(node_id)


def _shape_or_fault(path: str, adapters: Sequence[str], mmproj: str, draft: str) -> ModelShape | ArrieroError:
    try:
        shape = read_shape(path)
        companions = Companions(
            tuple(map(read_adapter, adapters)),
            _projector(mmproj) if mmproj else None,
            read_shape(draft) if draft and draft != path else None,
            mtp=draft == path,
        )
        return accompanied(shape, companions)
    except InvalidGGUF as fault:
        return fault
    except Rejected as misfit:  # an adapter or a draft of another model
        return InvalidGGUF(misfit.message, path=path)
    except OSError:
        raise
    except Exception as error:  # a header may hold anything; a second try would fail in the same way
        log.exception("the header of %s was not understood", path)
        return InvalidGGUF(f"{path}: its header was not understood ({type(error).__name__}: {error})", path=path)


def _projector(path: str) -> Projector:
    try:
        return read_projector(path)
    except InvalidGGUF as fault:
        raise InvalidGGUF(f"{fault.message} (mmproj: none in the catalogue leaves it out)", **fault.details) from None


# Four pools of threads: waits for processes must not delay the reading of headers, nor headers the rest.
@ray.remote(
    num_cpus=0, max_restarts=-1, max_concurrency=4, concurrency_groups={"headers": 2, "waiting": 16, "reading_ahead": 1}
)
class NodeActor:
    """`scheduler` is an actor handle with `report_node(NodeReading)`. Create it with hard affinity to its node."""

    def __init__(self, node_id: NodeId, settings: NodeSettings, scheduler: Any) -> None:
        address = ray.util.get_node_ip_address()
        self._monitor = NodeMonitor(node_id, settings, Reporter(scheduler.report_node), address=address)
        self._watchdog = Watchdog(node_id, self._monitor.device_processes)
        every(SEARCH_S, self._monitor.search, "search for models", rest=19.0)
        every(REPORT_S, self._monitor.sample, "report the node")
        every(LOOK_EVERY_S, self._watchdog.look, "watch the processes")

    def facts(self) -> NodeFacts:
        return self._monitor.facts

    def sample_now(self) -> NodeReading:
        """A reading taken after this call began."""
        return self._monitor.sample()

    def no_gpus_reason(self) -> str:
        """Why this node has no NVIDIA cards to offer ("" when its driver answers)."""
        return unavailable_reason()

    @ray.method(concurrency_group="headers")
    def read_shape(
        self, path: str, adapters: Sequence[str] = (), mmproj: str = "", draft: str = ""
    ) -> ModelShape | ArrieroError:
        """See `NodeMonitor.read_shape`; faults are values."""
        return self._monitor.read_shape(path, adapters, mmproj, draft)

    @ray.method(concurrency_group="reading_ahead")
    def read_ahead(self, path: str) -> None:
        """See `NodeMonitor.read_ahead`."""
        self._monitor.read_ahead(path)

    def stop_reading_ahead(self) -> None:
        """See `NodeMonitor.stop_reading_ahead`."""
        self._monitor.stop_reading_ahead()

    def process_alive(self, pid: int, started_at_s: float) -> bool:
        """Whether that process runs; `started_at_s` as `actors.devices.processes.started_at_s` gives it."""
        return processes.process_alive(pid, started_at_s)

    @ray.method(concurrency_group="waiting")
    def wait_gone(self, runners: Sequence[tuple[int, float]], timeout_s: float) -> tuple[int, ...]:
        """See `NodeMonitor.wait_gone`."""
        return self._monitor.wait_gone(runners, timeout_s)

    def kill_process(self, pid: int, started_at_s: float) -> bool:
        """SIGKILL a runner that Ray could not end; False when that process is gone or is no runner of this user."""
        return processes.kill_process(pid, started_at_s, titled=_RUNNER_TITLE)

    def last_words(self, runner: processes.Process) -> str:
        """Why a runner died, as far as its error output or the watchdog says; else ""."""
        logs = Path(processes.this_process().stderr_path).parent  # Ray keeps all of a node's in one folder
        words = (last_words(runner.stderr_path, logs), self._watchdog.reason(*runner.identity))
        return "; ".join(filter(None, words))
