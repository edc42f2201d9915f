"""Virtual GPUs against the real llama.cpp: memory is shared, enforced, reported, and comes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from beside import SOURCE_ROOT, Program
from tiny_llama import CLIENT, RUNNER, write_tiny_llama

from actors.devices.node import NodeMonitor, NodeSettings
from actors.devices.processes import started_at_s, wait_gone
from actors.devices.virtual import create_virtual_gpus, read_virtual_gpu, start_device_process
from scheduler.cluster.facts import DeviceFacts
from scheduler.errors import EngineFailed
from scheduler.units import MIB, NodeId

pytestmark = pytest.mark.llama


def gpu(directory: Path, capacity_bytes: int) -> DeviceFacts:
    return create_virtual_gpus(NodeId("n1"), [capacity_bytes], directory)[0]


def test_llama_sees_the_limit_and_what_is_left(tmp_path: Path, beside: Callable[..., Program]) -> None:
    facts = gpu(tmp_path, 40 * MIB)
    weights_bytes = write_tiny_llama(tmp_path / "tiny.gguf")
    with start_device_process(facts.state_path, facts.total_bytes) as device:
        client = beside(CLIENT, tmp_path / "tiny.gguf", 256, device.endpoint)
        assert json.loads(client.line())["memory"] == [40 * MIB, 40 * MIB]

        loaded = client.ask("load")
        reading = read_virtual_gpu(facts)
        assert loaded["loaded"], loaded
        assert reading.used_bytes > weights_bytes
        assert loaded["memory"] == [reading.free_bytes, 40 * MIB]
        assert reading.processes == {os.getpid(): reading.used_bytes}
        assert client.ask("decode")["status"] == 0

        client.end()
    assert read_virtual_gpu(facts).free_bytes == 40 * MIB


def test_two_models_compete_for_one_virtual_gpu(tmp_path: Path, beside: Callable[..., Program]) -> None:
    write_tiny_llama(tmp_path / "tiny.gguf")
    roomy = gpu(tmp_path / "roomy", 100 * MIB)
    with start_device_process(roomy.state_path, roomy.total_bytes) as device:
        alone = beside(CLIENT, tmp_path / "tiny.gguf", 4096, device.endpoint)
        alone.line()
        alone.ask("load")
        one_model_bytes = read_virtual_gpu(roomy).used_bytes
        alone.end()

    facts = gpu(tmp_path / "tight", one_model_bytes * 3 // 2)
    with (
        start_device_process(facts.state_path, facts.total_bytes, owner_pid=1001) as first,
        start_device_process(facts.state_path, facts.total_bytes, owner_pid=1002) as second,
    ):
        holder = beside(CLIENT, tmp_path / "tiny.gguf", 4096, first.endpoint)
        latecomer = beside(CLIENT, tmp_path / "tiny.gguf", 4096, second.endpoint)
        holder.line(), latecomer.line()
        assert holder.ask("load")["loaded"]
        # What the one holds is gone for the other, in llama.cpp's own eyes.
        assert latecomer.ask("memory")["memory"][0] == facts.total_bytes - one_model_bytes

        refused = latecomer.ask("load")
        assert not refused["loaded"]
        assert "failed to allocate" in refused["failed"]
        reading = read_virtual_gpu(facts)
        assert reading.processes is not None and reading.processes[1001] == one_model_bytes
        assert reading.used_bytes <= facts.total_bytes
        assert first.alive() and second.alive()

        # Once the first one is gone there is room, and the same device process serves a new client.
        first.close()
        latecomer.end()
        retry = beside(CLIENT, tmp_path / "tiny.gguf", 4096, second.endpoint)
        retry.line()
        assert retry.ask("load")["loaded"]
        assert read_virtual_gpu(facts).processes == {1002: one_model_bytes}


def test_a_killed_runner_gives_its_bytes_back(tmp_path: Path, beside: Callable[..., Program]) -> None:
    facts = gpu(tmp_path, 40 * MIB)
    write_tiny_llama(tmp_path / "tiny.gguf")
    runner = beside(RUNNER, facts.state_path, facts.total_bytes)
    endpoint, device_pid = runner.line().split()
    client = beside(CLIENT, tmp_path / "tiny.gguf", 256, endpoint)
    client.line()
    assert client.ask("load")["loaded"]
    assert read_virtual_gpu(facts).processes == {runner.process.pid: read_virtual_gpu(facts).used_bytes}

    device = (int(device_pid), started_at_s(int(device_pid)) or 0.0)
    runner.process.send_signal(signal.SIGKILL)
    assert wait_gone([device], timeout_s=20.0) == ()
    assert read_virtual_gpu(facts).free_bytes == 40 * MIB


def test_who_waits_for_a_killed_runner_finds_its_memory_back(tmp_path: Path, beside: Callable[..., Program]) -> None:
    settings = NodeSettings((), (40 * MIB,), str(tmp_path))
    node = NodeMonitor(NodeId("n1"), settings, lambda _: True, address="127.0.0.1")
    facts = node.facts.devices[0]
    write_tiny_llama(tmp_path / "tiny.gguf")
    runner = beside(RUNNER, facts.state_path, facts.total_bytes)
    client = beside(CLIENT, tmp_path / "tiny.gguf", 256, runner.line().split()[0])
    client.line()
    assert client.ask("load")["loaded"]
    identity = (runner.process.pid, started_at_s(runner.process.pid) or 0.0)
    assert node.wait_gone([identity], timeout_s=0.01) == (runner.process.pid,)

    runner.process.send_signal(signal.SIGKILL)
    assert node.wait_gone([identity], timeout_s=20.0) == ()
    assert read_virtual_gpu(facts).free_bytes == 40 * MIB


def test_a_killed_device_process_is_noticed_and_holds_nothing(tmp_path: Path, beside: Callable[..., Program]) -> None:
    facts = gpu(tmp_path, 40 * MIB)
    write_tiny_llama(tmp_path / "tiny.gguf")
    with start_device_process(facts.state_path, facts.total_bytes) as device:
        client = beside(CLIENT, tmp_path / "tiny.gguf", 256, device.endpoint)
        client.line()
        client.ask("load")
        identity = (device.pid, started_at_s(device.pid) or 0.0)
        os.kill(device.pid, signal.SIGKILL)
        assert wait_gone([identity], timeout_s=20.0) == ()
        # Nobody has reaped it yet: a zombie has no memory.
        assert read_virtual_gpu(facts).free_bytes == 40 * MIB
        assert not device.alive()


def test_a_device_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = gpu(tmp_path, 40 * MIB)
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    with pytest.raises(EngineFailed, match="no libllama in"):
        start_device_process(facts.state_path, facts.total_bytes)


def test_a_device_that_hangs_is_given_up(tmp_path: Path) -> None:
    facts = gpu(tmp_path, 40 * MIB)
    with pytest.raises(EngineFailed, match=r"did not serve within 0\.001 s"):
        start_device_process(facts.state_path, facts.total_bytes, timeout_s=0.001)
    assert read_virtual_gpu(facts).used_bytes == 0


def test_a_device_process_prints_nothing(tmp_path: Path) -> None:
    facts = gpu(tmp_path, 40 * MIB)
    source = RUNNER.replace("sys.stdin.read()", "device.close()")
    ended = subprocess.run(
        [sys.executable, "-c", source, facts.state_path, str(facts.total_bytes)],
        capture_output=True,
        text=True,
        cwd=SOURCE_ROOT,
        check=True,
    )
    assert ended.stderr == ""
    assert len(ended.stdout.splitlines()) == 1
