"""Metrics take the names that people give to their models."""

from __future__ import annotations

from actors.metrics import FootprintMetrics
from scheduler.commands import Announce


def test_names_may_be_of_any_alphabet() -> None:
    """Ray's gauges refuse all but ASCII; an error here once cost the request its grant."""
    for name in ("ñame", "模型", "plain"):
        notice = Announce("replica_ready", "it is ready", name, data={"buffers": {f"gpu0 on {name}": (1, 2)}})
        FootprintMetrics().observe(notice)
