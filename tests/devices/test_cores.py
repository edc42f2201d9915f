"""A node's cores are divided among those that compute, however they come, go and die."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.devices import cores as module
from actors.devices.cores import Cores


@settings(max_examples=50, deadline=None)
@given(n_cores=st.integers(1, 9), steps=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=20))
def test_there_are_no_more_threads_than_cores(
    n_cores: int, steps: list[tuple[int, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("node") / "own"
    runners = [Cores.on_node("box", n_cores, folder=folder) for _ in range(4)]
    computing: set[int] = set()
    for who, computes in steps:
        if computes:
            computing.add(who)
            runners[who].share()
        else:
            computing.discard(who)
            runners[who].leave()
    shares = {who: runners[who].share() for who in computing}
    assert sum(shares.values()) == (max(n_cores, len(shares)) if shares else 0)
    assert not shares or max(shares.values()) - min(shares.values()) <= 1


def compute(folder: Path, told: Connection) -> None:
    told.send(Cores.on_node("box", 4, folder=folder).share())
    told.recv()
    os._exit(1)  # while it computes


def test_who_died_while_it_computed_holds_no_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.0)
    mine = Cores.on_node("box", 4, folder=tmp_path / "own")
    assert mine.share() == 4
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    other = context.Process(target=compute, args=[tmp_path / "own", there])
    other.start()
    assert here.recv() == 2
    assert mine.share() == 2
    here.send("die")
    other.join()
    assert mine.share() == 4


def test_another_node_is_another_matter(tmp_path: Path) -> None:
    one, other = (Cores.on_node(name, 4, folder=tmp_path / "own") for name in ("box", "attic"))
    assert (one.share(), other.share()) == (4, 4)


def test_where_nothing_can_be_shared_a_replica_takes_all(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    assert Cores.on_node("box", 3, folder=open_to_all).share() == 3
