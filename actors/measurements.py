"""Where measurements are kept: a small SQLite database on the head, read once at the start and added to after loads.

Written by one thread of its own, so that a slow disk delays no decision. What cannot be read or written costs only what
was remembered: a damaged file is set aside, and Arriero measures anew.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from scheduler.costs.measurements import Record

log = logging.getLogger(__name__)

_TABLE = """
create table if not exists records (
    kind text not null, key text not null, value text not null, updated_at_s real not null, primary key (kind, key)
)
"""


def state_directory() -> Path:
    """Where this account keeps what Arriero has to know again after a restart."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "arriero"


def llama_build() -> str:
    """The release of llama-cpp-python that is installed here, "" if none."""
    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return ""


def measurements_path() -> Path:
    return state_directory() / "measurements.db"


def read_measurements(path: Path) -> list[Record]:
    """All records in the database at `path`; none when there is no database.

    Raises sqlite3.DatabaseError for a file that is damaged or is something else.
    """
    if not path.exists():
        return []
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
        rows = database.execute("select kind, key, value from records").fetchall()
    records = []
    for kind, key, value in rows:
        try:
            records.append(Record(kind, key, json.loads(value)))
        except (TypeError, ValueError):
            log.warning("a measurement in %s cannot be read and is left out", path)
    return records


class MeasurementStore:
    """The database at `path`. `records` is what it held; `trouble` says what was lost on the way, "" if nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="measurements")
        self._database: sqlite3.Connection | None = None
        self.records: list[Record] = []
        self.trouble = ""
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            self._set_aside(error)
        except OSError as error:
            self.trouble = f"measurements cannot be stored in {path}: {error}"

    def _open(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        database = sqlite3.connect(self._path, check_same_thread=False)
        try:
            database.execute("pragma journal_mode = wal")
            database.execute("pragma synchronous = normal")
            database.execute(_TABLE)
            database.commit()
            self.records = read_measurements(self._path)
        except sqlite3.Error:
            database.close()
            raise
        self._database = database

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        aside = self._path.with_name(f"{self._path.name}.damaged-{time.time_ns()}")
        try:
            self._path.rename(aside)
            for suffix in ("-wal", "-shm"):
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
            self._open()
        except (OSError, sqlite3.Error) as again:
            self.trouble = f"measurements cannot be stored in {self._path}: {again}"
        else:
            self.trouble = f"the measurements in {self._path} were damaged ({error}) and are now in {aside.name}"

    def put(self, record: Record) -> None:
        """Store `record` soon, in place of an earlier one of its kind and key. Never raises."""
        if self._database is not None:
            self._writer.submit(self._write, self._database, record)

    def _write(self, database: sqlite3.Connection, record: Record) -> None:
        row = (record.kind, record.key, json.dumps(dict(record.value)), time.time())
        try:
            with database:
                database.execute("insert or replace into records values (?, ?, ?, ?)", row)
        except sqlite3.Error as error:
            log.warning("a measurement was not stored in %s: %s", self._path, error)

    def close(self) -> None:
        """Finish writing."""
        self._writer.shutdown()
        if self._database is not None:
            self._database.close()
