"""Cores and memory are what the process may use, not what the machine has."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from actors.devices.host import memory_available_bytes, memory_total_bytes, physical_cores
from scheduler.units import GIB, MIB


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def topology(cpus_per_core: int) -> dict[str, str]:
    return {
        f"sys/devices/system/cpu/cpu{cpu}/topology/{name}": str(value)
        for order, cpu in enumerate(sorted(os.sched_getaffinity(0)))
        for name, value in (("physical_package_id", 0), ("core_id", order // cpus_per_core))
    }


def test_without_limits_it_is_the_machine(tmp_path: Path) -> None:
    assert memory_total_bytes(tmp_path) == psutil.virtual_memory().total
    assert 0 < memory_available_bytes(tmp_path) <= psutil.virtual_memory().total


def test_the_machine_itself_can_be_read() -> None:
    assert 1 <= physical_cores() <= len(os.sched_getaffinity(0))
    assert 0 < memory_available_bytes() <= memory_total_bytes() <= psutil.virtual_memory().total


@pytest.mark.parametrize("folder", ["", "system.slice/ray.service/"])
def test_version_2_limit_of_any_enclosing_group_counts_and_cache_is_free(tmp_path: Path, folder: str) -> None:
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/system.slice/ray.service",
            "sys/fs/cgroup/system.slice/ray.service/memory.max": "max",
            "sys/fs/cgroup/system.slice/ray.service/memory.current": str(400 * MIB),
            f"sys/fs/cgroup/{folder}memory.max": str(512 * MIB),
            f"sys/fs/cgroup/{folder}memory.current": str(400 * MIB),
            f"sys/fs/cgroup/{folder}memory.stat": f"active_file {200 * MIB}\ninactive_file {100 * MIB}",
        },
    )
    assert memory_total_bytes(tmp_path) == 512 * MIB
    assert memory_available_bytes(tmp_path) == 412 * MIB


def test_version_1_limit_counts_inside_a_container_that_cannot_see_its_own_path(tmp_path: Path) -> None:
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(256 * MIB),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(250 * MIB),
            "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {50 * MIB}\ntotal_active_file 0",
        },
    )
    assert memory_total_bytes(tmp_path) == 256 * MIB
    assert memory_available_bytes(tmp_path) == 56 * MIB


def test_version_1_without_a_limit_is_the_machine(tmp_path: Path) -> None:
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(0x7FFFFFFFFFFFF000),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GIB),
            "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0",
        },
    )
    assert memory_total_bytes(tmp_path) == psutil.virtual_memory().total


def test_memory_over_the_limit_is_none_available_not_less(tmp_path: Path) -> None:
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/",
            "sys/fs/cgroup/memory.max": str(100 * MIB),
            "sys/fs/cgroup/memory.current": str(120 * MIB),
            "sys/fs/cgroup/memory.stat": "active_file 0\ninactive_file 0",
        },
    )
    assert memory_available_bytes(tmp_path) == 0


def test_hardware_threads_of_one_core_count_once(tmp_path: Path) -> None:
    allowed = len(os.sched_getaffinity(0))
    assert physical_cores(tree(tmp_path / "plain", topology(1))) == allowed
    assert physical_cores(tree(tmp_path / "twin", topology(2))) == -(-allowed // 2)


@pytest.mark.parametrize(
    "quota",
    [
        {"proc/self/cgroup": "0::/box", "sys/fs/cgroup/box/cpu.max": "150000 100000"},
        {
            "proc/self/cgroup": "2:cpu,cpuacct:/box",
            "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "150000",
            "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000",
        },
    ],
)
def test_a_quota_of_cpu_time_is_rounded_down_to_cores(tmp_path: Path, quota: dict[str, str]) -> None:
    assert physical_cores(tree(tmp_path, {**topology(1), **quota})) == 1


def test_half_a_core_is_still_one(tmp_path: Path) -> None:
    tree(tmp_path, {**topology(1), "proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"})
    assert physical_cores(tmp_path) == 1


def test_no_quota_is_no_limit(tmp_path: Path) -> None:
    tree(tmp_path, {**topology(1), "proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"})
    assert physical_cores(tmp_path) == len(os.sched_getaffinity(0))
