"""The shared count never passes the capacity, whoever takes, gives back or dies."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from beside import SOURCE_ROOT, Program
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.devices.byte_count import ByteCount
from actors.devices.virtual import create_virtual_gpus, read_virtual_gpu, virtual_gpu_holders
from scheduler.errors import InvariantBroken
from scheduler.units import MIB, NodeId

TAKER = """
import sys
from actors.devices.byte_count import ByteCount

path, capacity_bytes, owner_pid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
count = ByteCount(path)
for line in sys.stdin:
    change = int(line)
    if change >= 0:
        print(str(count.take(change, capacity_bytes, owner_pid)).lower(), flush=True)
    else:
        count.give_back(-change, owner_pid)
        print("null", flush=True)
"""


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(-60, 60), max_size=30))
def test_take_and_give_back_follow_plain_arithmetic(tmp_path_factory: Any, sizes: list[int]) -> None:
    count = ByteCount.create(tmp_path_factory.mktemp("count") / "gpu")
    held = 0
    for size in sizes:
        if size >= 0:
            assert count.take(size, 100, owner_pid=7) == (held + size <= 100)
            held += size if held + size <= 100 else 0
        else:
            count.give_back(min(-size, held), owner_pid=7)
            held -= min(-size, held)
        assert count.used_bytes() == held <= 100


def test_processes_share_the_capacity_and_the_dead_hold_nothing(tmp_path: Path, beside: Any) -> None:
    count = ByteCount.create(tmp_path / "gpu")
    takers: list[Program] = [beside(TAKER, count.path, 100, owner) for owner in (11, 12)]
    assert takers[0].ask("60") is True
    assert takers[1].ask("41") is False
    assert takers[1].ask("40") is True
    assert {(holder.owner_pid, holder.held_bytes) for holder in count.holders()} == {(11, 60), (12, 40)}

    takers[0].end()
    assert [(holder.owner_pid, holder.held_bytes) for holder in count.holders()] == [(12, 40)]
    size_before = count.path.stat().st_size
    assert count.take(60, 100, owner_pid=13)
    assert count.path.stat().st_size == size_before, "the row of the dead process is used again"
    assert not count.take(1, 100, owner_pid=13)


def test_who_was_stopped_with_the_lock_can_be_seen(tmp_path: Path, beside: Any) -> None:
    (facts,) = create_virtual_gpus(NodeId("n"), [100], tmp_path)
    taker: Program = beside(TAKER, facts.state_path, 100, 11)
    assert taker.ask("60") is True
    with Path(facts.state_path).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # whoever waits for it waits for ever
        (holder,) = virtual_gpu_holders(facts)
    assert (holder.pid, holder.owner_pid, holder.held_bytes) == (taker.process.pid, 11, 60)


def test_many_at_once_never_pass_the_capacity(tmp_path: Path) -> None:
    count = ByteCount.create(tmp_path / "gpu")
    source = (
        "import sys; from actors.devices.byte_count import ByteCount; count = ByteCount(sys.argv[1]);"
        "print(sum(count.take(1, 500, 1) for _ in range(200)), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", source, str(count.path)]
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=SOURCE_ROOT) for _ in range(4)
    ]
    taken = [int(racer.stdout.readline()) for racer in racers if racer.stdout is not None]
    try:
        assert sum(taken) == 500 == count.used_bytes()
    finally:
        for racer in racers:
            racer.communicate()


def test_an_existing_count_is_kept(tmp_path: Path, beside: Any) -> None:
    first = create_virtual_gpus(NodeId("n1"), [MIB, 2 * MIB], tmp_path / "state")
    assert [facts.label for facts in first] == ["gpu0", "gpu1"]
    assert [facts.product for facts in first] == ["virtual GPU 1.0 MiB", "virtual GPU 2.0 MiB"]
    taker = beside(TAKER, first[0].state_path, MIB, 42)
    assert taker.ask(str(MIB // 2)) is True
    again = create_virtual_gpus(NodeId("n1"), [MIB, 2 * MIB], tmp_path / "state")
    assert again == first
    assert read_virtual_gpu(again[0]).processes == {42: MIB // 2}
    assert read_virtual_gpu(again[0]).free_bytes == MIB // 2


def test_a_missing_or_foreign_count_makes_a_lost_device(tmp_path: Path) -> None:
    facts = create_virtual_gpus(NodeId("n1"), [MIB], tmp_path)[0]
    assert read_virtual_gpu(facts).lost_reason == ""
    Path(facts.state_path).unlink()
    lost = read_virtual_gpu(facts)
    assert lost.free_bytes == 0 and "No such file" in lost.lost_reason

    Path(facts.state_path).write_text("somebody else's notes")
    assert "not the byte count" in read_virtual_gpu(facts).lost_reason
    with pytest.raises(InvariantBroken, match="delete it"):
        ByteCount(facts.state_path).take(1, MIB, 1)
