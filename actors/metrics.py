"""Metrics of the scheduler. Ray serves them to Prometheus at every node's metrics port."""

from __future__ import annotations

from ray.util.metrics import Gauge

from scheduler.commands import Announce

_TAGS = ("model", "device")


class FootprintMetrics:
    """What was predicted for the latest load of each model on each device, and what llama.cpp then allocated."""

    def __init__(self) -> None:
        self._predicted = Gauge(
            "arriero_buffers_predicted_bytes", "Bytes predicted for the buffers of the latest load", _TAGS
        )
        self._measured = Gauge("arriero_buffers_measured_bytes", "Bytes that llama.cpp reported for them", _TAGS)

    def observe(self, notice: Announce) -> None:
        """Take the figures of a load that succeeded."""
        if notice.kind == "replica_ready":
            for device, (predicted, measured) in notice.data["buffers"].items():
                tags = {"model": _tag(notice.model), "device": _tag(device)}
                self._predicted.set(predicted, tags)
                self._measured.set(measured, tags)


def _tag(name: str) -> str:
    """A tag's value: Ray takes ASCII only."""
    return name.encode("ascii", "backslashreplace").decode()
