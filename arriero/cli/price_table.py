"""The places that a plan chose among, each with the terms of its price, like a database's EXPLAIN."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table


class PricedRow(NamedTuple):
    """Seconds; `service_s` and `tokens_per_s` are None where speeds are not known. `chosen`: the winner."""

    chosen: bool
    where: str
    wait_s: float
    release_s: float
    load_s: float
    service_s: float | None
    regret_s: float
    total_s: float
    tokens_per_s: float | None


def price_table(title: str, rows: Iterable[PricedRow]) -> Table:
    figures = ("wait", "release", "load", "service", "regret", "total", "tokens/s")
    table = Table("", "where", *(Column(name, no_wrap=True) for name in figures), title=title, box=SIMPLE_HEAD)
    for row in rows:
        terms = (row.wait_s, row.release_s, row.load_s, row.service_s, row.regret_s, row.total_s, row.tokens_per_s)
        table.add_row("*" if row.chosen else "", row.where, *("?" if term is None else f"{term:.1f}" for term in terms))
    return table
