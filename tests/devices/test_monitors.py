"""The monitors without Ray: what is news, what a node tells, what crosses process borders."""

from __future__ import annotations

import dataclasses
import logging
import pickle
import queue
from pathlib import Path

import pytest
from tiny_llama import write_tiny_llama

from actors.devices.gpu import GpuMonitor, read_device
from actors.devices.node import NodeMonitor, NodeSettings
from actors.devices.reporting import every
from actors.devices.virtual import create_virtual_gpus
from scheduler.cluster.facts import DeviceFacts, DeviceReading, NodeReading
from scheduler.errors import InvalidGGUF, Rejected
from scheduler.units import GIB, MIB, DeviceId, NodeId

FACTS = DeviceFacts(DeviceId("GPU-a"), NodeId("n1"), "gpu0", "Stub", "cuda", 8 * GIB)
READING = DeviceReading(FACTS.device_id, 8 * GIB, 6 * GIB, 2 * GIB, 0.0, processes={7: 2 * GIB})


class Card:
    """A device whose reading, clock and line to the scheduler the test holds in its hands."""

    def __init__(self) -> None:
        self.now_s, self.reading, self.line_free = 100.0, READING, True
        self.reported: list[DeviceReading] = []
        self.monitor = GpuMonitor(FACTS, self.report, read=lambda _: self.reading, clock=lambda: self.now_s)

    def report(self, reading: DeviceReading) -> bool:
        if self.line_free:
            self.reported.append(pickle.loads(pickle.dumps(reading)))
        return self.line_free

    def shows(self, after_s: float, **changes: object) -> int:
        """Sample after `after_s` seconds with these changes; how many reports there are now."""
        self.now_s += after_s
        self.reading = dataclasses.replace(self.reading, **changes)  # type: ignore[arg-type]
        assert self.monitor.sample() == self.reading
        return len(self.reported)


def test_reports_at_first_and_every_second() -> None:
    card = Card()
    assert [card.shows(0.25) for _ in range(9)] == [1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_reports_a_change_of_free_memory_at_once() -> None:
    card = Card()
    card.shows(0.0)
    assert card.shows(0.25, free_bytes=6 * GIB - MIB + 1) == 1
    assert card.shows(0.25, free_bytes=6 * GIB - MIB) == 2
    assert card.shows(0.25, free_bytes=6 * GIB) == 3


def test_changes_add_up_until_they_are_news() -> None:
    card = Card()
    card.shows(0.0)
    assert [card.shows(0.1, free_bytes=6 * GIB - step * MIB // 4) for step in (1, 2, 3, 4)] == [1, 1, 1, 2]


def test_reports_loss_and_recovery_at_once() -> None:
    card = Card()
    card.shows(0.0)
    assert card.shows(0.25, lost_reason="GPU is lost") == 2
    assert card.shows(0.25, lost_reason="") == 3
    assert card.reported[1].lost_reason == "GPU is lost"


def test_what_could_not_be_sent_is_offered_again_with_newer_numbers() -> None:
    card = Card()
    card.line_free = False
    assert card.shows(0.0) == 0
    assert card.shows(0.25, free_bytes=5 * GIB) == 0
    card.line_free = True
    assert card.shows(0.25, free_bytes=4 * GIB) == 1
    assert card.reported[0].free_bytes == 4 * GIB


def test_reads_virtual_and_real_devices_by_kind(tmp_path: Path) -> None:
    virtual = create_virtual_gpus(NodeId("n1"), [MIB], tmp_path)[0]
    assert read_device(virtual).free_bytes == MIB
    unknown = dataclasses.replace(FACTS, device_id=DeviceId("GPU-00000000-no-such-card"))
    assert read_device(unknown).lost_reason != ""


def node(settings: NodeSettings, reports: list[NodeReading] | None = None) -> NodeMonitor:
    def report(reading: NodeReading) -> bool:
        (reports if reports is not None else []).append(pickle.loads(pickle.dumps(reading)))
        return True

    return NodeMonitor(NodeId("n1"), pickle.loads(pickle.dumps(settings)), report, address="10.0.0.7")


def test_a_node_tells_what_it_has_and_what_it_holds(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "tiny.gguf")
    reports: list[NodeReading] = []
    settings = NodeSettings((str(tmp_path),), (96 * MIB, 64 * MIB), str(tmp_path / "state"))
    monitor = node(settings, reports)
    facts = pickle.loads(pickle.dumps(monitor.facts))
    assert facts == monitor.facts
    assert facts.address == "10.0.0.7" and facts.physical_cores >= 1
    assert [(device.label, device.total_bytes) for device in facts.devices] == [("gpu0", 96 * MIB), ("gpu1", 64 * MIB)]

    monitor.search()
    assert monitor.sample() == reports[0]
    assert [Path(model.path).name for model in reports[0].files] == ["tiny.gguf"]
    assert 0 < reports[0].memory_available_bytes <= facts.memory_total_bytes


def test_shapes_are_read_once_and_again_when_the_file_changed(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_llama(path)
    monitor = node(NodeSettings())
    shape = monitor.read_shape(str(path))
    assert not isinstance(shape, Exception)
    assert pickle.loads(pickle.dumps(shape)).n_tensors == shape.n_tensors > 0
    assert monitor.read_shape(str(path)) is shape

    path.write_bytes(b"GGUF and nothing more")
    fault = pickle.loads(pickle.dumps(monitor.read_shape(str(path))))
    assert isinstance(fault, InvalidGGUF)


def test_a_header_that_is_not_understood_is_the_file_s_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_nothing(path: str) -> None:
        raise IndexError("tuple index out of range")

    path = tmp_path / "tiny.gguf"
    write_tiny_llama(path)
    monkeypatch.setattr("actors.devices.node.read_shape", read_nothing)
    fault = node(NodeSettings()).read_shape(str(path))
    assert isinstance(fault, InvalidGGUF) and "was not understood (IndexError" in fault.message


def test_a_file_that_cannot_be_read_is_a_refusal_with_the_cause(tmp_path: Path) -> None:
    fault = node(NodeSettings()).read_shape(str(tmp_path / "missing.gguf"))
    assert isinstance(fault, Rejected) and not isinstance(fault, InvalidGGUF)
    assert "No such file" in fault.message


def test_work_that_fails_is_logged_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    tried: queue.Queue[None] = queue.Queue()

    def work() -> None:
        tried.put(None)
        raise OSError("the disk is gone")

    with caplog.at_level(logging.ERROR):
        ended = every(0.001, work, "search for models")
        for _ in range(3):
            tried.get(timeout=20.0)
        ended.set()
    assert "search for models failed and will be tried again" in caplog.text
