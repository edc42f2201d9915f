"""Traces of requests: read from CSV, or made by chance from a seed.

Two formats are read: `timestamp_s,model,prompt_tokens,output_tokens`, and that of the Azure LLM inference traces
(`TIMESTAMP,ContextTokens,GeneratedTokens`), which names no models: they are then drawn by a popularity law.
"""

from __future__ import annotations

import csv
import datetime
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scheduler.errors import Rejected

COLUMNS = ("timestamp_s", "model", "prompt_tokens", "output_tokens")
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOST_TOKENS = 1 << 24
LONGEST_S = 400 * 86400.0
"""No trace spans more."""
_IN_BURST_S = 5.0
"""Between two requests of a burst, at most, on average."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """`at_s` counts from the first request of the trace."""

    at_s: float
    model: str
    prompt_tokens: int
    output_tokens: int


class Popularity:
    """Which model is asked for, by Zipf's law: the n-th of `models` with weight n^-`exponent`.

    With `drift_s`, the ranks move on by one model every so many seconds: what was hot cools down.
    """

    def __init__(self, models: Sequence[str], exponent: float = 1.0, drift_s: float = 0.0) -> None:
        self._models = list(models)
        self._weights = [1 / (rank + 1) ** exponent for rank in range(len(self._models))]
        self._drift_s = drift_s

    def draw(self, at_s: float, chance: random.Random) -> str:
        (rank,) = chance.choices(range(len(self._models)), self._weights)
        moved = int(at_s / self._drift_s) if self._drift_s else 0
        return self._models[(rank + moved) % len(self._models)]


def read_trace(lines: Iterable[str], popularity: Popularity, seed: int, source: str = "trace") -> list[TraceRequest]:
    """The requests in CSV, in order of time. Raises Rejected that names the line."""
    reader = csv.DictReader(lines)
    chance = random.Random(seed)
    try:
        columns = reader.fieldnames or []
        read = _request if set(COLUMNS) <= set(columns) else _azure_request
        known = set(COLUMNS) <= set(columns) or set(AZURE_COLUMNS) <= set(columns)
        found = [read(row, reader.line_num, source) for row in reader] if known else []
    except csv.Error as error:
        raise Rejected(f"{source}, line {reader.line_num}: {error}") from None
    if not known:
        raise Rejected(
            f"{source}: its columns are {', '.join(columns) or 'none'}; needed are {', '.join(COLUMNS)} "
            f"(or {', '.join(AZURE_COLUMNS)})"
        )
    if not found:
        raise Rejected(f"{source} holds no requests")
    found.sort(key=lambda request: request.at_s)
    first = found[0].at_s
    if found[-1].at_s - first > LONGEST_S:
        raise Rejected(f"{source} spans {found[-1].at_s - first:.0f} s: are its times in seconds?")
    return [
        TraceRequest(
            each.at_s - first,
            each.model or popularity.draw(each.at_s - first, chance),
            each.prompt_tokens,
            each.output_tokens,
        )
        for each in found
    ]


def _request(row: dict[str, str], line: int, source: str) -> TraceRequest:
    at_s = _number(row["timestamp_s"], line, source, "timestamp_s")
    model = (row["model"] or "").strip()
    if not model:
        raise Rejected(f"{source}, line {line}: no model is named")
    return TraceRequest(at_s, model, *(_tokens(row[key], line, source, key) for key in COLUMNS[2:]))


def _azure_request(row: dict[str, str], line: int, source: str) -> TraceRequest:
    text = row["TIMESTAMP"] or ""
    try:
        moment = datetime.datetime.fromisoformat(text[:26].strip())  # microseconds; the traces have a digit more
    except ValueError:
        raise Rejected(f"{source}, line {line}: {text!r} is no time") from None
    at_s = moment.replace(tzinfo=datetime.timezone.utc).timestamp()
    return TraceRequest(at_s, "", *(_tokens(row[key], line, source, key) for key in AZURE_COLUMNS[1:]))


def _number(text: str | None, line: int, source: str, key: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise Rejected(f"{source}, line {line}: {key} is {text!r}, not a number")
    return value


def _tokens(text: str | None, line: int, source: str, key: str) -> int:
    value = _number(text, line, source, key)
    if not 0 <= value <= _MOST_TOKENS:
        raise Rejected(f"{source}, line {line}: {key} is {text!r}; it must be between 0 and {_MOST_TOKENS}")
    return max(1, int(value))


def made_trace(
    popularity: Popularity, seed: int, *, n_requests: int, mean_gap_s: float, burst: float = 4.0, day_s: float = 3600.0
) -> list[TraceRequest]:
    """Requests by chance, in bursts for one model: about `burst` requests (at least 1), a third of `mean_gap_s` apart
    but 5 seconds at most, and then a pause of `burst * mean_gap_s` seconds on average.

    The pause is five times as long at the start of a "day" of `day_s` seconds, and little more than half of it in its
    middle; 0: all hours are alike. Prompts and answers are log-normal, around 400 and 150 tokens. Raises Rejected when
    the trace spans longer than LONGEST_S.
    """
    chance = random.Random(seed)
    requests: list[TraceRequest] = []
    at_s = 0.0
    while len(requests) < n_requests:
        busy = 1 - 0.8 * math.cos(2 * math.pi * at_s / day_s) if day_s else 1.0
        at_s += chance.expovariate(1 / (mean_gap_s * burst)) / busy
        model = popularity.draw(at_s, chance)
        size = 1 + int(chance.expovariate(1 / (burst - 1))) if burst > 1 else 1
        for _ in range(min(size, n_requests - len(requests))):
            prompt, output = (max(1, int(chance.lognormvariate(math.log(m), 0.8))) for m in (400, 150))
            requests.append(TraceRequest(at_s, model, prompt, output))
            at_s += chance.expovariate(1 / min(_IN_BURST_S, mean_gap_s / 3))
    if requests and requests[-1].at_s > LONGEST_S:
        raise Rejected(
            f"these requests would come over {requests[-1].at_s / 86400:.0f} days: fewer, or at shorter gaps"
        )
    return sorted(requests, key=lambda request: request.at_s)
