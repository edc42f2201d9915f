"""NVIDIA GPUs as their driver reports them, through NVML.

A GPU is identified by its UUID: `CUDA_VISIBLE_DEVICES` takes it, and unlike an index it survives a reboot. Bytes
exclude what the driver reserves for itself, which NVML's second memory structure tells (drivers before 510 count that
as used). If a driver does not know a call, the field is None. If a GPU does not answer, the reading has a `lost_reason`
and zeros. A reading takes less than a millisecond on a healthy GPU. On a failing one NVML may block for seconds, so do
not call this on an event loop.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import pynvml

from actors.devices.processes import sees_host_pids
from scheduler.cluster.facts import DeviceFacts, DeviceReading
from scheduler.costs.params import NO_RATES, Rates
from scheduler.units import DeviceId, NodeId

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class DriverUnavailable(Exception):
    """No NVIDIA driver to ask; the text says why."""


def list_gpus(node_id: NodeId) -> tuple[DeviceFacts, ...]:
    """All cards that models can be put on, in PCI order; empty where there is no driver (`unavailable_reason`).

    Left out, with a warning: cards split by MIG (CUDA cannot join their parts) and those without memory of their own.
    """
    found = []
    try:
        _start()
        for index in range(pynvml.nvmlDeviceGetCount()):
            with contextlib.suppress(_Unsuitable):
                found.append(_facts(node_id, index))
    except DriverUnavailable:
        return ()
    except pynvml.NVMLError as error:
        _log.warning("NVML stopped answering while GPUs were listed: %s", error)
    return tuple(found)


def unavailable_reason() -> str:
    """Why no card can be listed on this machine ("" when the driver answers)."""
    try:
        _start()
    except DriverUnavailable as error:
        return str(error)
    return ""


def read_gpu(uuid: str) -> DeviceReading:
    """What the card shows now. `utilisation` is 0..1 over the driver's last sample period, temperature in Celsius."""
    try:
        _start()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        total_bytes, free_bytes, used_bytes = _memory(handle)
        return DeviceReading(
            device_id=DeviceId(uuid),
            total_bytes=total_bytes,
            free_bytes=free_bytes,
            used_bytes=used_bytes,
            sampled_at_s=time.time(),
            processes=_processes(handle),
            utilisation=_if_known(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
            temperature_c=_if_known(
                lambda: float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
            ),
        )
    except (pynvml.NVMLError, DriverUnavailable) as error:
        return DeviceReading(DeviceId(uuid), 0, 0, 0, time.time(), lost_reason=f"the driver does not answer: {error}")


class _Unsuitable(Exception):
    """A card that no model can be put on."""


def _facts(node_id: NodeId, index: int) -> DeviceFacts:
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        mig_mode = _if_known(lambda: pynvml.nvmlDeviceGetMigMode(handle)[0])
        if mig_mode == pynvml.NVML_DEVICE_MIG_ENABLE:
            raise _Unsuitable("it is split by MIG")
        return DeviceFacts(
            device_id=DeviceId(pynvml.nvmlDeviceGetUUID(handle)),
            node_id=node_id,
            label=f"gpu{index}",
            product=pynvml.nvmlDeviceGetName(handle),
            kind="cuda",
            total_bytes=_memory(handle)[0],
            rates=_rates(handle),
        )
    except (_Unsuitable, pynvml.NVMLError) as error:
        _log.warning("GPU %d is left out: %s", index, error)
        raise _Unsuitable(str(error)) from error


def _rates(handle: Any) -> Rates:
    """Peak rates by the GPU's clocks: two transfers per memory clock over the whole bus, and one multiplication and one
    addition per core and clock. Zeros where the driver does not say."""

    def at_best() -> Rates:
        memory_hz = 1e6 * pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM)
        core_hz = 1e6 * pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)
        bus_bytes = pynvml.nvmlDeviceGetMemoryBusWidth(handle) / 8
        return Rates(2 * memory_hz * bus_bytes, 2 * core_hz * pynvml.nvmlDeviceGetNumGpuCores(handle))

    return _if_known(at_best) or NO_RATES


def _memory(handle: Any) -> tuple[int, int, int]:
    """Total, free and used bytes, without the driver's own memory where it is known."""
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        return memory.total - memory.reserved, memory.free, memory.used
    except (pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_ArgumentVersionMismatch):
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return memory.total, memory.free, memory.used


def _processes(handle: Any) -> dict[int, int] | None:
    """Bytes per pid over compute and graphics; None where the driver gives no usable pids or sizes.

    Sizes are missing under WSL and for MIG; pids are those of the host, which a container cannot match to its own.
    """
    if not sees_host_pids():
        return None
    found: dict[int, int] = {}
    for kind in ("Compute", "Graphics"):
        running = _if_known(partial(_running, kind, handle))
        if running is None or any(process.usedGpuMemory is None for process in running):
            return None
        for process in running:
            # A process that computes and draws is listed twice, each time with all its memory.
            found[process.pid] = max(found.get(process.pid, 0), process.usedGpuMemory)
    return found


def _running(kind: str, handle: Any) -> list[Any]:
    try:
        answer: list[Any] = getattr(pynvml, f"nvmlDeviceGet{kind}RunningProcesses_v3")(handle)
    except pynvml.NVMLError_FunctionNotFound:
        answer = getattr(pynvml, f"nvmlDeviceGet{kind}RunningProcesses_v2")(handle)
    return answer


def _if_known(ask: Callable[[], _T]) -> _T | None:
    """The driver's answer, or None when this driver or card does not offer it. A lost card stays an error."""
    try:
        return ask()
    except (pynvml.NVMLError_GpuIsLost, pynvml.NVMLError_ResetRequired):
        raise
    except pynvml.NVMLError:
        return None


def _start() -> None:
    """Load and start NVML. NVML counts its users: once it has started, this takes microseconds."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        raise DriverUnavailable("libnvidia-ml.so.1 is not installed: no NVIDIA driver on this machine") from None
    except pynvml.NVMLError as error:
        raise DriverUnavailable(f"the NVIDIA driver does not start: {error}") from None
