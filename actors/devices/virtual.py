"""Virtual GPUs: devices with a memory limit, for machines without a GPU.

A virtual GPU is a capacity and a shared count of bytes (`byte_count`). llama.cpp's RPC server takes one client at a
time, so each runner brings a device process of its own per virtual GPU (`rpc_device`); all of them draw on the same
count, so that two models really compete for the memory, and a load too many really fails inside llama.cpp.

A device process ends with its runner, kill -9 included, and holds nothing from that moment on. Starting one takes some
0.1 s. Tensors are sized as on the CPU (alignment 32, no row padding), computing is done by one thread per process.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from actors.devices.byte_count import ByteCount, Holder
from scheduler.cluster.facts import DeviceFacts, DeviceReading
from scheduler.errors import EngineFailed, InvariantBroken
from scheduler.units import DeviceId, NodeId, format_bytes

DEVICE_PROCESS = "actors.devices.rpc_device"
"""The module that a device process runs: a word of its command line."""

_SOURCE_ROOT = Path(__file__).parents[2]


def create_virtual_gpus(
    node_id: NodeId, capacities_bytes: Sequence[int], directory: str | Path
) -> tuple[DeviceFacts, ...]:
    """One virtual GPU per capacity (bytes), their counts in `directory` on this node.

    Idempotent: a count that is there is kept, for runners that outlived the caller may still hold memory.
    """
    folder = Path(directory)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return tuple(
        DeviceFacts(
            device_id=DeviceId(f"virtual-{node_id}-{index}"),
            node_id=node_id,
            label=f"gpu{index}",
            product=f"virtual GPU {format_bytes(capacity_bytes)}",
            kind="rpc",
            total_bytes=capacity_bytes,
            state_path=str(ByteCount.create(folder / f"virtual-{node_id}-{index}").path),
        )
        for index, capacity_bytes in enumerate(capacities_bytes)
    )


def read_virtual_gpu(facts: DeviceFacts) -> DeviceReading:
    """What the virtual GPU holds now; `processes` names the runners, not their device processes.

    If the count cannot be read, the device counts as lost, like a card that fell off the bus.
    """
    try:
        holders = ByteCount(facts.state_path).holders()
    except (OSError, InvariantBroken) as error:
        return DeviceReading(
            facts.device_id, facts.total_bytes, 0, 0, time.time(), lost_reason=f"its byte count is unusable: {error}"
        )
    per_runner: Counter[int] = Counter()
    for holder in holders:
        per_runner[holder.owner_pid] += holder.held_bytes
    used_bytes = per_runner.total()
    return DeviceReading(
        device_id=facts.device_id,
        total_bytes=facts.total_bytes,
        free_bytes=max(0, facts.total_bytes - used_bytes),
        used_bytes=used_bytes,
        sampled_at_s=time.time(),
        processes=dict(per_runner),
    )


def virtual_gpu_holders(facts: DeviceFacts) -> tuple[Holder, ...]:
    """The live device processes on a virtual GPU, without waiting for its lock. None for a real GPU, or if
    the count cannot be read."""
    try:
        return ByteCount(facts.state_path).glance() if facts.kind == "rpc" else ()
    except (OSError, InvariantBroken):
        return ()


class DeviceProcess:
    """A running device process of this runner. llama.cpp connects to it at `endpoint` ("127.0.0.1:port")."""

    def __init__(self, process: subprocess.Popen[bytes], endpoint: str) -> None:
        self._process = process
        self.endpoint = endpoint

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        """Whether the device still serves. Once False, the replica that used it is broken for good."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process and wait until it is gone (milliseconds). Then its memory is free. Idempotent."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> DeviceProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_device_process(
    state_path: str | Path,
    total_bytes: int,
    *,
    owner_pid: int | None = None,
    threads: int = 1,
    timeout_s: float = 30.0,
) -> DeviceProcess:
    """Start this runner's device process on the virtual GPU with that count and capacity; returns when it serves.

    `owner_pid` is the runner's pid that readings name, this process's by default; `threads` compute threads.
    Raises EngineFailed with the cause when the process does not serve within `timeout_s` seconds.
    """
    owner = os.getpid() if owner_pid is None else owner_pid
    command = [sys.executable, "-m", DEVICE_PROCESS, str(Path(state_path).absolute())]
    process = subprocess.Popen(
        [*command, str(total_bytes), str(owner), str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=_SOURCE_ROOT,  # "-m" looks here first, wherever this runner was started
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},  # a virtual GPU never touches a real one
    )
    device = DeviceProcess(process, "")
    try:
        device.endpoint = _await_endpoint(process, state_path, timeout_s)
    except BaseException:
        process.kill()
        device.close()
        raise
    return device


def _await_endpoint(process: subprocess.Popen[bytes], state_path: str | Path, timeout_s: float) -> str:
    """Read the process's only line. It is written in one piece: when the first byte is there, all of it is."""
    assert process.stdout is not None
    with process.stdout, selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(timeout_s):
            raise EngineFailed(f"the device process of virtual GPU {state_path} did not serve within {timeout_s:g} s")
        line = process.stdout.readline()
    answer = json.loads(line) if line else {"error": f"it ended with status {process.wait()} and said nothing"}
    if "error" in answer:
        raise EngineFailed(f"the device process of virtual GPU {state_path} could not start: {answer['error']}")
    return str(answer["endpoint"])
