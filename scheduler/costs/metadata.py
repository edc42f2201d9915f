"""Typed access to the metadata of a GGUF: a key of the wrong type or size is the file's fault, and says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scheduler.costs.header import Array, Scalar
from scheduler.errors import InvalidGGUF

LIMIT = 1 << 31
"""No sensible hyper-parameter is this large."""


class Metadata:
    """The metadata of one model. Keys are given without the architecture's prefix. All methods raise InvalidGGUF."""

    def __init__(self, values: Mapping[str, Scalar | Array], path: str) -> None:
        self.values = values
        self.path = path
        self.arch = self._text("general.architecture")

    def refuse(self, why: str) -> InvalidGGUF:
        return InvalidGGUF(f"{self.path}: {why}", path=self.path, offset=0)

    def _text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str) or not value:
            raise self.refuse(f"{key} is missing, so this file cannot be loaded as a model")
        return value

    def number(self, key: str, default: int | None = None) -> int:
        value = self.values.get(f"{self.arch}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(f"metadata key {self.arch}.{key} is {_say(value)}, not a whole number")
        if not 0 <= value < LIMIT:
            raise self.refuse(f"metadata key {self.arch}.{key} is {value}: absurd")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(f"{self.arch}.{key}", default)
        if not isinstance(value, bool):
            raise self.refuse(f"metadata key {self.arch}.{key} is {_say(value)}, not true or false")
        return value

    def array(self, key: str) -> tuple[int, ...] | None:
        value = self.values.get(f"{self.arch}.{key}")
        if not isinstance(value, Array):
            return None
        if value.values is None or not all(isinstance(v, int) and 0 <= v < LIMIT for v in value.values):
            raise self.refuse(f"metadata key {self.arch}.{key} is not a list of sensible whole numbers")
        return tuple(int(v) for v in value.values)

    def per_layer(self, key: str, count: int, default: int | Sequence[int]) -> tuple[int, ...]:
        """One number per layer, from a list or from one number for all (`get_key_or_arr`)."""
        if f"{self.arch}.{key}" not in self.values:
            return (default,) * count if isinstance(default, int) else tuple(default)
        values = self.array(key)
        if values is None:
            return (self.number(key),) * count
        if len(values) != count:
            raise self.refuse(f"metadata key {self.arch}.{key} has {len(values)} entries for {count} layers")
        return values


def _say(value: object) -> str:
    return "missing" if value is None else f"{value!r}"[:60]
