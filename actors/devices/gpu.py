"""One actor per GPU: it watches the GPU and tells the scheduler what has changed.

It takes a sample every 0.25 s, in its own thread, from NVML or from the count of a virtual GPU. It sends a report when
free memory has changed by a MiB or more, when health has changed, and at least every second. Its share of the GPU in
Ray (`num_gpus`) is set by its creator. A scheduler that hears nothing for seconds must treat the GPU as lost: drivers
can hang.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from actors.devices.nvml import read_gpu
from actors.devices.pulse import sign_in
from actors.devices.reporting import Reporter, every
from actors.devices.virtual import read_virtual_gpu
from scheduler.cluster.facts import DeviceFacts, DeviceReading
from scheduler.units import MIB

SAMPLE_S = 0.25
REPORT_S = 1.0
READ_WITHIN_S = 30.0
"""A driver that does not answer within this time hangs. Then the node ends this process, and Ray starts it again."""


def read_device(facts: DeviceFacts) -> DeviceReading:
    """What the device shows now, real or virtual; never raises for a device that is lost."""
    return read_virtual_gpu(facts) if facts.kind == "rpc" else read_gpu(facts.device_id)


class GpuMonitor:
    """Samples one device and decides what is news. Safe to call from several threads.

    `report` takes a reading and returns whether it was sent. If not, the next sample is offered.
    """

    def __init__(
        self,
        facts: DeviceFacts,
        report: Callable[[DeviceReading], bool],
        *,
        read: Callable[[DeviceFacts], DeviceReading] = read_device,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.facts = facts
        self._report, self._read, self._clock = report, read, clock
        self._reported: DeviceReading | None = None
        self._reported_at_s = 0.0
        self._lock = threading.Lock()

    def sample(self) -> DeviceReading:
        """Read the device now, and report the reading if it is news."""
        with self._lock:
            reading = self._read(self.facts)
            if self._is_news(reading) and self._report(reading):
                self._reported, self._reported_at_s = reading, self._clock()
            return reading

    def _is_news(self, reading: DeviceReading) -> bool:
        last = self._reported
        return (
            last is None
            or self._clock() - self._reported_at_s >= REPORT_S
            or last.lost_reason != reading.lost_reason
            or abs(last.free_bytes - reading.free_bytes) >= MIB
        )


@ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=4)
class GpuActor:
    """`scheduler` is an actor handle with `report_device(DeviceReading)`. Create it on the device's own node."""

    def __init__(self, facts: DeviceFacts, scheduler: Any) -> None:
        self._monitor = GpuMonitor(facts, Reporter(scheduler.report_device))
        self._pulse = sign_in(ray.get_runtime_context().get_node_id(), "GpuActor", "a reading of its GPU")
        every(SAMPLE_S, self._sample, f"watch {facts.label}")

    def _sample(self) -> None:
        self._pulse.promise(READ_WITHIN_S)
        self._monitor.sample()

    def facts(self) -> DeviceFacts:
        return self._monitor.facts

    def sample_now(self) -> DeviceReading:
        """A reading taken after this call began. It confirms that memory is really free."""
        return self._monitor.sample()
