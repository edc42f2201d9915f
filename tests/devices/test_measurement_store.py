"""The database of measurements: it survives restarts, and being damaged costs only what it held."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from actors.measurements import MeasurementStore, read_measurements
from scheduler.costs.measurements import Record

RECORD = Record("overhead", "a card, 1.0", {"bytes": 7})


def test_records_survive_and_newer_ones_replace_older_ones(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "measurements.db"
    store = MeasurementStore(path)
    assert (store.records, store.trouble) == ([], "")
    store.put(RECORD)
    store.put(Record("out_of_memory", "a", {"extra_bytes": 1}))
    store.put(Record(RECORD.kind, RECORD.key, {"bytes": 8}))
    store.close()
    again = MeasurementStore(path)
    assert sorted((r.kind, r.value["bytes"]) for r in again.records if r.kind == "overhead") == [("overhead", 8)]
    assert len(again.records) == 2
    again.close()


@pytest.mark.parametrize(
    "content", [b"this is no database, and long enough to be taken for one" * 20, b"SQLite format 3\0"]
)
def test_a_damaged_database_is_set_aside(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "measurements.db"
    path.write_bytes(content)
    store = MeasurementStore(path)
    assert store.records == [] and "damaged" in store.trouble
    store.put(RECORD)
    store.close()
    assert read_measurements(path) == [RECORD]
    (aside,) = tmp_path.glob("measurements.db.damaged-*")
    assert aside.read_bytes() == content


def test_another_table_of_the_same_name_is_damage_too(tmp_path: Path) -> None:
    path = tmp_path / "measurements.db"
    with sqlite3.connect(path) as database:
        database.execute("create table records (a text)")
    database.close()
    store = MeasurementStore(path)
    assert "damaged" in store.trouble
    store.close()


def test_a_folder_that_cannot_be_written_costs_the_memory_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = MeasurementStore(tmp_path / "file" / "measurements.db")
    assert "cannot be stored" in store.trouble
    store.put(RECORD)
    store.close()


def test_a_value_that_is_not_json_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "measurements.db"
    store = MeasurementStore(path)
    store.put(RECORD)
    store.close()
    with sqlite3.connect(path) as database:
        database.execute("insert into records values ('load', 'x', '{', 0)")
    database.close()
    assert read_measurements(path) == [RECORD]
