"""llama.cpp is asked before a load, in a process of its own."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.devices.byte_count import ByteCount
from actors.measurements import llama_build
from actors.serving.preflight import PreflightUnavailable, ask_llama_cpp, check_prediction
from actors.serving.protocol import BufferSizes, LoadDevice, LoadFailed, LoadFailure, LoadReport
from actors.serving.runner import Runner
from scheduler.costs.footprint import footprint
from scheduler.costs.measurements import ROUNDING_BYTES
from scheduler.costs.params import DeviceBytes, DeviceSpec, HostBytes, Layout
from scheduler.costs.shape import read_shape

pytestmark = pytest.mark.llama


def test_it_answers_what_is_predicted_without_taking_memory(
    sample: Callable[..., Path], spec: Any, virtual_gpus: tuple[LoadDevice, ...]
) -> None:
    path = sample("llama", n_layer=8)
    wanted = spec(path, devices=virtual_gpus, n_gpu_layers=-1, tensor_split=(4.0, 5.0))
    truth = ask_llama_cpp(wanted)
    devices = tuple(DeviceSpec(f"gpu{i}", "rpc") for i in range(2))
    ours = footprint(read_shape(path), Layout(devices, -1, (4, 5)), wanted.context, llama_build())
    for predicted, said in zip(ours.devices, truth.devices, strict=True):
        assert (said.weights_bytes, said.kv_bytes) == (predicted.weights_bytes, predicted.kv_bytes)
        assert said.compute_bytes >= predicted.compute_bytes
    assert truth.host.weights_bytes == ours.host.weights_bytes
    assert not any(holder.held_bytes for gpu in virtual_gpus for holder in ByteCount(gpu.state_path).holders())


def test_on_the_cpu_it_is_equal(sample: Callable[..., Path], spec: Any) -> None:
    path = sample("llama")
    wanted = spec(path)
    truth = ask_llama_cpp(wanted)
    ours = footprint(read_shape(path), Layout(), wanted.context, llama_build())
    assert replace(truth.host, output_bytes=0) == replace(ours.host, output_bytes=0)


def test_a_load_that_was_underestimated_is_refused_with_the_truth(
    sample: Callable[..., Path], spec: Any, virtual_gpus: tuple[LoadDevice, ...]
) -> None:
    small = tuple(replace(gpu, required_bytes=1024) for gpu in virtual_gpus[:1])
    wanted = replace(spec(sample("llama"), devices=small, n_gpu_layers=-1, tensor_split=(1.0,)), preflight=True)
    with closing(Runner()) as runner:
        failure = runner.load("r", wanted)
    assert isinstance(failure, LoadFailure)
    assert failure.kind == "underestimated" and "1024 were reserved" in failure.message
    assert failure.buffers is not None
    enough = replace(small[0], required_bytes=failure.buffers.devices[0].total_bytes)
    with closing(Runner()) as runner:
        assert isinstance(runner.load("r", replace(wanted, devices=(enough,))), LoadReport)


def test_a_prediction_within_the_rounding_will_do(spec: Any, virtual_gpus: tuple[LoadDevice, ...]) -> None:
    wanted = spec(Path("m"), devices=(replace(virtual_gpus[0], required_bytes=1000),))
    truth = BufferSizes((DeviceBytes(1000 + ROUNDING_BYTES),), HostBytes(), 256)
    check_prediction(wanted, truth)
    more = replace(truth, devices=(DeviceBytes(1001 + ROUNDING_BYTES),))
    with pytest.raises(LoadFailed, match="1000 were reserved"):
        check_prediction(wanted, more)


def test_a_file_that_llama_cpp_refuses_or_ends_over(sample: Callable[..., Path], spec: Any, tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match="could not load"):
        ask_llama_cpp(spec(tmp_path / "missing.gguf"))
    broken = tmp_path / "broken.gguf"
    data = sample("llama").read_bytes()
    key = b"llama.block_count" + (4).to_bytes(4, "little")
    at = data.index(key) + len(key)
    broken.write_bytes(data[:at] + (100_000).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(LoadFailed, match="GGML_ASSERT"):
        ask_llama_cpp(spec(broken))


def test_what_goes_wrong_besides_the_model_is_not_blamed_on_it(
    sample: Callable[..., Path], spec: Any, virtual_gpus: tuple[LoadDevice, ...], tmp_path: Path
) -> None:
    lost = replace(virtual_gpus[0], state_path=str(tmp_path / "gone"))
    with pytest.raises(PreflightUnavailable, match=r"could not be asked \(exit status 1\)"):
        ask_llama_cpp(spec(sample("llama"), devices=(lost,), n_gpu_layers=-1, tensor_split=(1.0,)))


def test_sums_that_llama_cpp_does_not_log_are_no_answer(
    sample: Callable[..., Path], spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actors.serving import breakdown, native

    with closing(native.NativeModel(spec(sample("llama")), [], lambda progress: None, no_alloc=True)) as model:
        sums = model.breakdown()
        assert sums is not None
        garbage = replace(sums, host=replace(sums.host, compute_bytes=sums.host.compute_bytes + 2 * ROUNDING_BYTES))
        monkeypatch.setattr(breakdown, "memory_breakdown", lambda *_: garbage)
        assert model.breakdown() is None


def test_it_runs_nothing_from_the_folder_that_it_is_asked_in(
    sample: Callable[..., Path], spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sample("llama")
    (tmp_path / "pickle.py").write_text("raise SystemExit('this is not the standard library')")
    monkeypatch.chdir(tmp_path)
    assert ask_llama_cpp(spec(os.path.relpath(path))).host.weights_bytes > 0


def test_it_ends_with_the_process_that_asks(spec: Any, tmp_path: Path) -> None:
    pipe = tmp_path / "model.gguf"
    os.mkfifo(pipe)  # whoever reads it waits
    program = "import pickle, sys; from actors.serving.preflight import ask_llama_cpp"
    program += "; ask_llama_cpp(pickle.load(sys.stdin.buffer))"
    asking = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert asking.stdin is not None
    with asking.stdin:
        asking.stdin.write(pickle.dumps(spec(pipe)))
    while not (children := psutil.Process(asking.pid).children()):
        assert asking.poll() is None
    [asked] = children
    with pipe.open("wb"):  # opened at both ends: it is about to read
        asking.kill()
        asking.wait()
        gone, _ = psutil.wait_procs([asked], timeout=30)
    assert gone


def test_it_is_limited_in_time(sample: Callable[..., Path], spec: Any) -> None:
    with pytest.raises(PreflightUnavailable, match="gave no answer within"):
        ask_llama_cpp(spec(sample("llama")), timeout_s=0.01)
