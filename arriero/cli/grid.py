"""The grid of `arriero footprint`: a JSON list of layouts and contexts to cost, one object each.

Every key may be left out; an unknown key is an error that suggests the right one. Keys are llama.cpp's names.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scheduler.costs.params import ContextParams, DeviceSpec, Layout
from scheduler.errors import Rejected


@dataclass(frozen=True, slots=True)
class Case:
    """One object of the grid."""

    layout: Layout
    context: ContextParams
    use_mmap: bool = True
    use_extra_bufts: bool = False


_LAYOUT_DEFAULTS: dict[str, Any] = {
    "devices": [],
    "n_gpu_layers": -1,
    "tensor_split": None,
    "experts_on_host": False,
    "n_cpu_moe": 0,
    "use_mmap": True,
    "use_extra_bufts": False,
}


def read_grid(grid: Path | None) -> list[Case]:
    """The grid's cases; without a grid, one CUDA device that takes all, and the host alone."""
    if grid is None:
        entries: Any = [{"devices": [{"name": "gpu0", "kind": "cuda"}]}, {"n_gpu_layers": 0}]
        return [_case(entry, index) for index, entry in enumerate(entries)]
    try:
        entries = json.loads(grid.read_text(encoding="utf-8"))
    except OSError as error:
        raise Rejected(f"{grid}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise Rejected(f"{grid} is not valid JSON: {error}") from None
    if not isinstance(entries, list):
        raise Rejected(f"{grid} must hold a list of objects, not {_kind(entries)}")
    return [_case(entry, index) for index, entry in enumerate(entries)]


def _case(entry: Any, index: int) -> Case:
    """What one object of the grid asks for. Raises Rejected, naming the object and the key."""
    where = f"grid[{index}]"
    context_defaults = asdict(ContextParams())
    values = {**_LAYOUT_DEFAULTS, **context_defaults}
    for key, value in _object(entry, values, where).items():
        values[key] = _typed(value, values[key], f"{where}.{key}") if key in context_defaults else value
    if not isinstance(values["devices"], list):
        raise Rejected(f"{where}.devices must be a list of objects, not {_kind(values['devices'])}")
    devices = []
    for number, item in enumerate(values["devices"]):
        device = {"name": f"gpu{number}", "kind": "cuda"} | _object(
            item, {"name": "", "kind": ""}, f"{where}.devices[{number}]"
        )
        if device["kind"] not in ("cuda", "rpc") or not isinstance(device["name"], str):
            raise Rejected(f'{where}.devices[{number}] must have a name and the kind "cuda" or "rpc", it has {device}')
        devices.append(DeviceSpec(device["name"], device["kind"]))
    names = [device.name for device in devices]
    if len(set(names)) != len(names):
        raise Rejected(f"{where}.devices must have different names, not {', '.join(names)}")
    split = values["tensor_split"]
    if split is None:
        split = [1] * len(devices)
    if not isinstance(split, list) or not all(
        isinstance(share, int | float) and not isinstance(share, bool) for share in split
    ):
        raise Rejected(f"{where}.tensor_split must be a list of numbers, one per device")
    layout = Layout(
        devices=tuple(devices),
        n_gpu_layers=_typed(values["n_gpu_layers"], 0, f"{where}.n_gpu_layers"),
        tensor_split=tuple(float(share) for share in split),
        experts_on_host=_typed(values["experts_on_host"], False, f"{where}.experts_on_host"),
        n_cpu_moe=_typed(values["n_cpu_moe"], 0, f"{where}.n_cpu_moe"),
    )
    return Case(
        layout,
        ContextParams(**{key: values[key] for key in context_defaults}),
        _typed(values["use_mmap"], True, f"{where}.use_mmap"),
        _typed(values["use_extra_bufts"], False, f"{where}.use_extra_bufts"),
    )


def _object(value: Any, known: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Rejected(f"{where} must be an object, not {_kind(value)}")
    for key in value:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
            raise Rejected(f"{where} has the unknown key {key!r}; {hint}")
    return value


def _typed(value: Any, default: Any, where: str) -> Any:
    """`value`, which must be of the type of `default` (JSON's true is no number)."""
    if type(value) is not type(default):
        raise Rejected(f"{where} must be {_kind(default)}, not {value!r}")
    return value


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a whole number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), repr(value))
