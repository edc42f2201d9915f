"""Run every benchmark, or those that are named, each in a process of its own, and say on what machine.

python -m benchmarks [NAME ...]
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys

import psutil

BENCHMARKS = ("header", "footprint", "decisions", "scale", "eviction", "neighbours", "road", "serving")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    names = parser.parse_args().names
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"no benchmark has the name {min(unknown)!r}; there are {', '.join(BENCHMARKS)}")
    cores = psutil.cpu_count(logical=False)
    print(
        f"{platform.machine()}, {cores} cores, Python {platform.python_version()}, load {psutil.getloadavg()[0]:.1f}",
        flush=True,
    )
    return max(subprocess.call([sys.executable, "-m", f"benchmarks.{name}"]) for name in names or BENCHMARKS)


if __name__ == "__main__":
    sys.exit(main())
