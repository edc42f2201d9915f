"""Run every benchmark, each in a process of its own, and say on what machine."""

from __future__ import annotations

import platform
import subprocess
import sys

import psutil

BENCHMARKS = ("header", "footprint", "decisions", "scale", "eviction", "neighbours", "road", "serving")


def main() -> int:
    cores = psutil.cpu_count(logical=False)
    print(
        f"{platform.machine()}, {cores} cores, Python {platform.python_version()}, load {psutil.getloadavg()[0]:.1f}",
        flush=True,
    )
    return max(subprocess.call([sys.executable, "-m", f"benchmarks.{name}"]) for name in BENCHMARKS)


if __name__ == "__main__":
    sys.exit(main())
