"""The pre-flight: a process of its own asks llama.cpp what a load would take, before the model is loaded.

A load with `no_alloc` reads the header, places every tensor and reserves the graph, but allocates next to nothing. It
runs in a process with a time limit, because llama.cpp ends the process over some files. With CUDA devices that process
has a CUDA context on each while it runs: no more memory than the load itself will need there.
The answer is never below what a load takes. On later devices of a pipeline it is one activation per copy above.
The process ends with its parent, and after the time limit even without one: nobody else knows of its memory.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from actors.devices.processes import end_with_parent
from actors.devices.virtual import start_device_process
from actors.serving.protocol import BufferSizes, LoadFailed, LoadSpec
from actors.serving.visible import show_only
from scheduler.costs.measurements import ROUNDING_BYTES
from scheduler.costs.params import DeviceBytes, HostBytes

TIMEOUT_S = 60.0
_ANSWER = "PREFLIGHT "
_SOURCE_ROOT = Path(__file__).parents[2]
_LLAMA_CPP_ENDED = {-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGFPE, -signal.SIGILL, -signal.SIGBUS}
"""Exit statuses that a file can cause: a failed assertion, or an arithmetic error."""


class PreflightUnavailable(Exception):
    """llama.cpp gave no answer, for a reason that has nothing to do with the load."""


def ask_llama_cpp(spec: LoadSpec, timeout_s: float = TIMEOUT_S) -> BufferSizes:
    """What llama.cpp would allocate for `spec`.

    Raises LoadFailed when llama.cpp refuses the file or ends over it, PreflightUnavailable when it cannot be asked here
    or does not answer in time.
    """
    asked = replace(spec, path=str(Path(spec.path).absolute()))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "actors.serving.preflight"],
            input=pickle.dumps(asked),
            capture_output=True,
            timeout=timeout_s,
            check=False,
            cwd=_SOURCE_ROOT,  # "-m" looks here first, wherever this process was started
        )
    except subprocess.TimeoutExpired:
        raise PreflightUnavailable(f"llama.cpp gave no answer within {timeout_s:.0f} s") from None
    words = done.stdout.decode("utf-8", "replace").splitlines()
    line = next((line for line in words if line.startswith(_ANSWER)), None)
    if line is None:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        why = next((words for words in said if "GGML_ASSERT" in words), " ".join(said[-1:]))
        if done.returncode in _LLAMA_CPP_ENDED:
            name = signal.Signals(-done.returncode).name
            raise LoadFailed("failed", f"llama.cpp aborts on this model ({name}): {why}")
        raise PreflightUnavailable(f"llama.cpp could not be asked (exit status {done.returncode}): {why}")
    answer = json.loads(line.removeprefix(_ANSWER))
    if "unavailable" in answer:
        raise PreflightUnavailable(answer["unavailable"])
    if "failure" in answer:
        raise LoadFailed(**answer["failure"])
    devices = tuple(DeviceBytes(**device) for device in answer["devices"])
    return BufferSizes(devices, HostBytes(**answer["host"]), answer["n_ctx_per_slot"])


def check_prediction(spec: LoadSpec, truth: BufferSizes) -> None:
    """Raises LoadFailed("underestimated") with `truth` when a device was reserved less than the load would take."""
    placement = spec.placement
    overheads = placement.overhead_bytes if placement else (0,) * len(spec.devices)
    for device, there, overhead in zip(spec.devices, truth.devices, overheads, strict=True):
        needed = there.total_bytes + overhead
        if needed > device.required_bytes + ROUNDING_BYTES:
            raise LoadFailed(
                "underestimated",
                f"llama.cpp would take {needed} bytes on {device.device_id}; {device.required_bytes} were reserved",
                truth,
            )


def _answer(spec: LoadSpec) -> dict[str, object]:
    from actors.serving.native import NativeModel

    with ExitStack() as devices:
        endpoints = [
            devices.enter_context(start_device_process(device.state_path, device.total_bytes)).endpoint
            for device in spec.devices
            if device.kind == "rpc"
        ]
        try:
            model = NativeModel(spec, endpoints, lambda progress: None, no_alloc=True)
        except LoadFailed as error:
            return {"failure": {"kind": error.failure.kind, "message": error.failure.message}}
        truth = model.breakdown()
        if truth is None:
            return {"unavailable": "this llama.cpp has no llama_get_memory_breakdown that could be read"}
        return {
            "devices": [asdict(device) for device in truth.devices],
            "host": asdict(truth.host),
            "n_ctx_per_slot": model.n_ctx_per_slot,
        }


def _end_with_parent() -> None:
    signal.alarm(int(TIMEOUT_S))  # its default action ends the process in the middle of C too
    end_with_parent()


def main() -> None:
    _end_with_parent()
    spec: LoadSpec = pickle.load(sys.stdin.buffer)
    show_only(spec.devices)
    print(_ANSWER + json.dumps(_answer(spec)), flush=True)
    os._exit(0)  # freeing buffers on devices that are gone is one of the things llama.cpp aborts for


if __name__ == "__main__":
    main()
