"""The runner without Ray: a fake engine for its own logic, real devices and models for what matters."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.devices.byte_count import ByteCount
from actors.devices.processes import started_at_s
from actors.serving.jobs import Job, Results
from actors.serving.protocol import (
    BufferSizes,
    Chunk,
    GenerateRequest,
    LoadDevice,
    LoadFailed,
    LoadFailure,
    LoadReport,
    LoadSpec,
)
from actors.serving.runner import Runner
from actors.serving.visible import show_only
from scheduler.costs.params import HostBytes
from scheduler.errors import EngineFailed, InvariantBroken, Rejected
from scheduler.units import MIB


class FakeEngine:
    """Speaks the engine's protocol; every message goes through pickle, as it would through Ray."""

    broken = ""
    active_requests: tuple[str, ...] = ()

    def __init__(self, spec: LoadSpec, endpoints: Sequence[str], on_progress: Callable[[float], object]) -> None:
        pickle.loads(pickle.dumps(spec))
        self.cancelled: list[str] = []
        self.closed = 0
        self.buffers = BufferSizes((), HostBytes(1, 2, 3, 4), 256)
        for progress in (0.0, 0.5, 1.0):
            on_progress(progress)

    def prepare(self, request: GenerateRequest, hearer: Results[Chunk], errand: object = None) -> Job[Chunk]:
        assert pickle.loads(pickle.dumps(request)) == request
        if request.max_tokens == 0:
            raise Rejected("no tokens")
        return Job(request.lease_id, [1], hearer)

    def submit(self, job: Job[Chunk]) -> None:
        for word in ("salt ", "and ", "wool"):
            job.hearer.say(Chunk(word))
        job.end()

    def drop(self, job: Job[Chunk]) -> None:
        self.cancelled.append(job.lease_id)

    def cancel(self, lease_id: str) -> bool:
        return lease_id == "known"

    def close(self) -> None:
        self.closed += 1


def answer(runner: Runner, request: GenerateRequest) -> str:
    results: Results[Chunk] = Results()
    runner.submit(runner.prepare(request, results))
    return "".join(chunk.text for chunk in results)


def ready(spec: LoadSpec) -> tuple[Runner, FakeEngine]:
    engines: list[FakeEngine] = []

    def load(*arguments: Any) -> Any:
        engines.append(FakeEngine(*arguments))
        return engines[-1]

    runner = Runner(load)
    assert isinstance(runner.load("r-1", spec), LoadReport)
    return runner, engines[0]


def test_a_load_reports_buffers_and_process(spec: Any) -> None:
    runner = Runner(FakeEngine)  # type: ignore[arg-type]
    idle = pickle.loads(pickle.dumps(runner.describe()))
    assert (idle.replica_id, idle.spec, idle.state) == ("", None, "idle")
    report = pickle.loads(pickle.dumps(runner.load("r-1", spec("m.gguf"))))
    assert isinstance(report, LoadReport)
    assert report.pid == os.getpid()
    assert report.process_started_at_s == started_at_s(os.getpid())
    assert report.buffers.host.total_bytes == 10
    status = pickle.loads(pickle.dumps(runner.describe()))
    assert (status.replica_id, status.state, status.report) == ("r-1", "ready", report)
    assert status.spec == spec("m.gguf")
    assert runner.progress() == 1.0


def test_a_runner_without_a_model_serves_nothing(ask: Any) -> None:
    runner = Runner(FakeEngine)  # type: ignore[arg-type]
    with pytest.raises(EngineFailed, match="this runner is idle"):
        answer(runner, ask())
    assert runner.watch() == "idle"
    assert (runner.progress(), runner.cancel("known")) == (0.0, False)


def test_a_runner_loads_once(spec: Any) -> None:
    runner, _ = ready(spec("m.gguf"))
    again = runner.load("r-1", spec("m.gguf"))
    assert isinstance(again, LoadFailure)
    assert "is ready; it loads once" in again.message


def test_progress_shows_during_the_load_and_is_complete_only_at_its_end(spec: Any) -> None:
    seen: list[float] = []

    def load(spec: LoadSpec, endpoints: Sequence[str], on_progress: Callable[[float], object]) -> Any:
        for progress in (0.25, 1.0):
            on_progress(progress)
            seen.append(runner.progress())
        assert runner.describe().state == "loading"
        return FakeEngine(spec, endpoints, on_progress)

    runner = Runner(load)
    runner.load("r-1", spec("m.gguf"))
    assert seen == [0.25, 0.99]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (LoadFailed("invalid_model", "not a GGUF"), "invalid_model", "not a GGUF"),
        (MemoryError("none left"), "failed", "MemoryError: none left"),
    ],
)
def test_a_failed_load_is_a_value_and_the_end_of_the_replica(
    error: Exception, kind: str, message: str, spec: Any, ask: Any
) -> None:
    def load(*_: Any) -> Any:
        raise error

    runner = Runner(load)
    failure = pickle.loads(pickle.dumps(runner.load("r-1", spec("m.gguf"))))
    assert failure == LoadFailure(kind, message)  # type: ignore[arg-type]
    assert runner.describe().state == "broken"
    with pytest.raises(EngineFailed, match=message):
        answer(runner, ask())


def test_streams_and_passes_refusals_on(spec: Any, ask: Any) -> None:
    runner, engine = ready(spec("m.gguf"))
    assert answer(runner, ask(lease_id="a")) == "salt and wool"
    with pytest.raises(Rejected, match="no tokens"):
        answer(runner, ask(max_tokens=0))
    assert runner.cancel("known")
    assert not runner.cancel("unknown")
    runner.drop(runner.prepare(ask(lease_id="b"), Results()))
    assert engine.cancelled == ["b"]


def test_a_broken_engine_breaks_the_replica(spec: Any, ask: Any) -> None:
    runner, engine = ready(spec("m.gguf"))
    engine.broken = "two decodes in a row failed"
    assert runner.watch() == "two decodes in a row failed"
    assert runner.describe().state == "broken"
    with pytest.raises(EngineFailed, match="two decodes"):
        answer(runner, ask())


def test_only_the_latest_watcher_watches(spec: Any) -> None:
    runner, engine = ready(spec("m.gguf"))
    reasons: list[str] = []
    first = threading.Thread(target=lambda: reasons.append(runner.watch()))
    first.start()
    second = threading.Thread(target=lambda: reasons.append(runner.watch()))
    second.start()
    first.join()
    assert reasons == ["another call watches"]
    engine.broken = "over"
    second.join()
    assert reasons[1:] == ["over"]


def test_a_closed_runner_serves_nothing(spec: Any, ask: Any) -> None:
    runner, engine = ready(spec("m.gguf"))
    runner.close()
    assert engine.closed == 1
    with pytest.raises(EngineFailed, match="is closed"):
        answer(runner, ask())


def test_refuses_when_the_host_has_too_little(spec: Any) -> None:
    failure = Runner(FakeEngine).load("r-1", spec("m.gguf", host_required_bytes=1 << 60))  # type: ignore[arg-type]
    assert isinstance(failure, LoadFailure)
    assert failure.kind == "refused"
    assert "1048576.0 TiB" in failure.message


def test_refuses_when_a_device_has_less_than_was_booked(spec: Any, virtual_gpus: tuple[LoadDevice, ...]) -> None:
    gpu = virtual_gpus[1]
    greedy = replace(gpu, required_bytes=gpu.total_bytes + 1)
    failure = Runner(FakeEngine).load("r-1", spec("m.gguf", devices=(greedy,)))  # type: ignore[arg-type]
    assert isinstance(failure, LoadFailure)
    assert failure.kind == "refused"
    assert f"{gpu.device_id} has 24.0 MiB free" in failure.message
    lost = replace(gpu, state_path="/nowhere")
    failure = Runner(FakeEngine).load("r-1", spec("m.gguf", devices=(lost,)))  # type: ignore[arg-type]
    assert isinstance(failure, LoadFailure)
    assert failure.kind == "refused"
    assert "cannot be used" in failure.message


def test_shows_only_its_own_cards_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "")
    monkeypatch.delitem(sys.modules, "actors.serving.native", raising=False)
    show_only((LoadDevice("GPU-b", "cuda", 0), LoadDevice("virtual", "rpc", 0), LoadDevice("GPU-a", "cuda", 0)))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-b,GPU-a"
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    show_only(())
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setitem(sys.modules, "actors.serving.native", sys)
    with pytest.raises(InvariantBroken, match="too late"):
        show_only(())


@pytest.mark.llama
def test_two_runners_share_a_virtual_gpu_and_give_it_back(
    sample: Callable[..., Path], spec: Any, ask: Any, virtual_gpus: tuple[LoadDevice, ...]
) -> None:
    path = sample("llama", n_layer=8, n_embd=256, n_ff=768)
    count = ByteCount(virtual_gpus[0].state_path)
    loaded = spec(path, devices=virtual_gpus[:1], n_gpu_layers=-1, tensor_split=(1.0,))
    with closing(Runner()) as first, closing(Runner()) as second:
        for runner in (first, second):
            assert isinstance(runner.load("r", loaded), LoadReport)
        one, other = (answer(runner, ask()) for runner in (first, second))
        assert one == other
        held = [holder.held_bytes for holder in count.holders()]
        assert len(held) == 2
        assert min(held) > 8 * MIB
        with closing(Runner()) as third:
            failure = third.load("r-3", loaded)
        assert isinstance(failure, LoadFailure)
        assert failure.kind == "out_of_memory"
        assert len(count.holders()) == 2
    assert not list(count.holders())


@pytest.mark.llama
def test_a_dead_device_process_breaks_the_replica(
    sample: Callable[..., Path], spec: Any, ask: Any, virtual_gpus: tuple[LoadDevice, ...]
) -> None:
    path = sample("llama")
    loaded = spec(path, devices=virtual_gpus, n_gpu_layers=-1, tensor_split=(2.0, 3.0))
    # Not closed: freeing buffers on a dead device is one of the things that llama.cpp aborts the process for.
    runner = Runner()
    assert isinstance(runner.load("r-1", loaded), LoadReport)
    assert answer(runner, ask(max_tokens=3))
    os.kill(runner._devices[1].pid, signal.SIGKILL)
    assert "has ended" in runner.watch()
    assert runner.describe().state == "broken"
    with pytest.raises(EngineFailed, match="broken"):
        answer(runner, ask())
    runner._devices[0].close()
