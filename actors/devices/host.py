"""Cores and memory of this machine, within the limits that this process has.

A container or a service may get less than the machine has (cgroup v1 or v2, CPU affinity). Then the smaller number
counts. `available` memory is what can be taken without swapping, with the page cache counted as free, like the kernel's
MemAvailable. `root` is "/" except in tests. A call takes a fraction of a millisecond.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT = Path("/")


def physical_cores(root: Path = _ROOT) -> int:
    """Cores, not hardware threads, that this process may keep busy; at least 1."""
    allowed = os.sched_getaffinity(0)
    cores = {_core_of(cpu, root) for cpu in allowed}
    count = len(cores) if None not in cores else min(psutil.cpu_count(logical=False) or len(allowed), len(allowed))
    return max(1, min([count, *(int(quota) for quota in _cpu_quotas(root))]))


def memory_total_bytes(root: Path = _ROOT) -> int:
    """Bytes of RAM that programs here may use in all."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _memory_limits(root))])


def memory_available_bytes(root: Path = _ROOT) -> int:
    """Bytes that a new program could take now without swapping."""
    left = (limit - used for limit, used in _memory_limits(root))
    return max(0, min([psutil.virtual_memory().available, *left]))


def _core_of(cpu: int, root: Path) -> tuple[str, str] | None:
    """Package and core of a hardware thread; threads of one core share it. None where the kernel does not say."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    package, core = _text(topology / "physical_package_id"), _text(topology / "core_id")
    return None if package is None or core is None else (package, core)


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Per enclosing group with a limit: the limit, and the bytes in use that cannot be reclaimed."""
    for group in _groups("memory", root):
        unified = group / "memory.max"
        if unified.exists():
            limit, usage, prefix = _text(unified), _text(group / "memory.current"), ""
        else:
            limit, usage = _text(group / "memory.limit_in_bytes"), _text(group / "memory.usage_in_bytes")
            prefix = "total_"  # in version 1 the plain names count the group without its children
        if limit is None or limit == "max" or usage is None:
            continue
        stat = dict(line.split(maxsplit=1) for line in (_text(group / "memory.stat") or "").splitlines())
        cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        yield int(limit), max(0, int(usage) - cache)


def _cpu_quotas(root: Path) -> Iterator[float]:
    """CPUs' worth of time per enclosing group that has a quota."""
    for group in _groups("cpu", root):
        unified = _text(group / "cpu.max")
        if unified is not None:
            quota, period = unified.split()
        else:
            quota, period = _text(group / "cpu.cfs_quota_us") or "-1", _text(group / "cpu.cfs_period_us") or "1"
        if quota not in ("max", "-1"):
            yield int(quota) / int(period)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the control groups around this process, innermost first, for version 1 and 2 alike.

    Inside a container the named path may not exist; the folders above it do, and the topmost is the container's own.
    """
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        innermost = top / path.lstrip("/")
        yield from (folder for folder in (innermost, *innermost.parents) if folder == top or top in folder.parents)


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
