"""The environment of every test, set before anything imports Ray: private, quiet, offline and of one width."""

from __future__ import annotations

import os
import tempfile

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_memory_monitor_refresh_ms="0",
    RAY_DEDUP_LOGS="0",
    HF_HUB_OFFLINE="1",
    COLUMNS="120",
    XDG_STATE_HOME=tempfile.mkdtemp(prefix="arriero-tests-"),  # nothing is remembered from one run to the next
)
