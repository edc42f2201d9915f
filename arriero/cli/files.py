"""`arriero inspect` and `arriero footprint`: what a GGUF file is and what it would cost, read from its header alone.

Neither talks to a service, starts Ray, or imports llama_cpp; both answer in a fraction of a second.
"""

from __future__ import annotations

import difflib
import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scheduler.errors import Rejected

if TYPE_CHECKING:
    from rich.table import Table

    from scheduler.costs.measurements import MeasuredLoad
    from scheduler.costs.params import ContextParams, Footprint, Layout
    from scheduler.costs.shape import ModelShape

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
File = Annotated[Path, typer.Argument(help="A GGUF file; of a model in several parts, any part.", show_default=False)]

BOUND = "an architecture that Arriero's formulas do not know: every figure is a cautious upper bound"


def inspect(file: File, json: AsJson = False) -> None:
    """What a GGUF file holds: architecture, layers and their bytes."""
    shape = _read(file)
    if json:
        print(jsonlib.dumps(_describe(shape), indent=2))
    else:
        _show_model(shape)


def footprint(
    file: File,
    grid: Annotated[
        Path | None, typer.Option(help="JSON file: a list of layouts and contexts to cost, one object each.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Bytes that a model takes per device and in host RAM, weights and caches exact, compute buffers bounded."""
    from scheduler.costs.footprint import footprint as cost

    shape = _read(file)
    cases = [_case(entry, index) for index, entry in enumerate(_entries(grid))]
    results = []
    for index, (layout, context) in enumerate(cases):
        try:
            results.append((layout, cost(shape, layout, context)))
        except Rejected as error:
            raise Rejected(f"grid[{index}]: {error.message}") from None
    measured = _measured(shape, cases)
    if json:
        answers = [
            _answer(layout, result) | {"sources": _sources(shape), "measured": _measured_answer(layout, load)}
            for (layout, result), load in zip(results, measured, strict=True)
        ]
        print(jsonlib.dumps(answers, indent=2))
    else:
        _show_costs(shape, cases, [result for _, result in results], measured)


def _read(file: Path) -> ModelShape:
    from scheduler.costs.shape import read_shape

    try:
        return read_shape(file)
    except OSError as error:
        raise Rejected(f"{file}: {error.strerror or error}") from None


# ---- the grid: what to cost ------------------------------------------------------------------------------------------

_LAYOUT_DEFAULTS: dict[str, Any] = {
    "devices": [],
    "n_gpu_layers": -1,
    "tensor_split": None,
    "experts_on_host": False,
}


def _entries(grid: Path | None) -> list[Any]:
    """The grid's objects; without a grid, one CUDA device that takes all, and the host alone."""
    if grid is None:
        return [{"devices": [{"name": "gpu0", "kind": "cuda"}]}, {"n_gpu_layers": 0}]
    try:
        entries = jsonlib.loads(grid.read_text(encoding="utf-8"))
    except OSError as error:
        raise Rejected(f"{grid}: {error.strerror or error}") from None
    except ValueError as error:
        raise Rejected(f"{grid} is not JSON: {error}") from None
    if not isinstance(entries, list):
        raise Rejected(f"{grid} must hold a list of objects, not {_kind(entries)}")
    return entries


def _case(entry: Any, index: int) -> tuple[Layout, ContextParams]:
    """(layout, context) that one object of the grid asks for. Raises Rejected, naming the object and the key."""
    from dataclasses import asdict

    from scheduler.costs.params import ContextParams, DeviceSpec, Layout

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
    )
    return layout, ContextParams(**{key: values[key] for key in context_defaults})


def _object(value: Any, known: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Rejected(f"{where} must be an object, not {_kind(value)}")
    for key in value:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise Rejected(f"{where} has the unknown key {key!r}; {hint}")
    return value


def _typed(value: Any, default: Any, where: str) -> Any:
    """`value`, which must be of the type of `default` (JSON's true is no number)."""
    if type(value) is not type(default):
        raise Rejected(f"{where} must be {_kind(default)}, not {value!r}")
    return value


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a whole number", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), repr(value))


def _measured(shape: ModelShape, cases: list[tuple[Layout, ContextParams]]) -> list[MeasuredLoad | None]:
    """What real loads took, where this machine is the head and has seen the same load before."""
    import sqlite3

    from actors.measurements import llama_build, measurements_path, read_measurements
    from scheduler.costs.measurements import Measurements

    try:
        memory = Measurements(read_measurements(measurements_path()))
    except (OSError, sqlite3.Error):
        memory = Measurements()  # a service that starts sets a damaged file aside, and says so
    return [memory.load(shape, layout, context, llama_build()) for layout, context in cases]


def _sources(shape: ModelShape) -> dict[str, str]:
    """Where each figure comes from: llama.cpp's own rules, its graph redrawn, or a bound that no load exceeds."""
    from scheduler.costs.footprint import computes_exactly

    rules = "rules" if shape.known_architecture else "bound"
    compute = "graph" if computes_exactly(shape) else "bound"
    return {"weights": rules, "kv": rules, "compute": compute, "output": rules}


def _measured_answer(layout: Layout, load: MeasuredLoad | None) -> dict[str, Any] | None:
    if load is None:
        return None
    outside = {device.name: count for device, count in zip(layout.devices, load.outside_bytes, strict=True)}
    return _answer(layout, load.buffers) | {"loads": load.loads, "outside_buffers_bytes": outside}


# ---- answers ---------------------------------------------------------------------------------------------------------


def _answer(layout: Layout, result: Footprint) -> dict[str, Any]:
    return {
        "devices": {
            device.name: {"weights_bytes": b.weights_bytes, "kv_bytes": b.kv_bytes, "compute_bytes": b.compute_bytes}
            for device, b in zip(layout.devices, result.devices, strict=True)
        },
        "host": {
            "weights_bytes": result.host.weights_bytes,
            "kv_bytes": result.host.kv_bytes,
            "compute_bytes": result.host.compute_bytes,
            "output_bytes": result.host.output_bytes,
        },
    }


def _describe(shape: ModelShape) -> dict[str, Any]:
    from scheduler.costs.footprint import computes_exactly

    return {
        "architecture": shape.architecture,
        "known_architecture": shape.known_architecture,
        "name": shape.name,
        "quantization": shape.quantization,
        "files": list(shape.paths),
        "file_bytes": shape.file_bytes,
        "weights_bytes": shape.weights_bytes,
        "experts_bytes": shape.experts_bytes,
        "n_tensors": shape.n_tensors,
        "compute_is_exact": computes_exactly(shape),
        "n_layer_all": shape.n_layer_all,
        "n_ctx_train": shape.n_ctx_train,
        "n_embd": shape.n_embd,
        "n_vocab": shape.n_vocab,
        "n_expert": shape.n_expert,
        "n_expert_used": shape.n_expert_used,
        "is_recurrent": shape.is_recurrent,
        "is_embedding_only": shape.is_embedding_only,
        "has_chat_template": shape.has_chat_template,
        "input_bytes": shape.stored.input,
        "output_bytes": shape.stored.output,
        "layers": [
            {
                "index": il,
                "bytes": stored.weights + stored.experts,
                "experts_bytes": stored.experts,
                "kind": _layer_kind(shape, il),
                "loaded": shape.arch.layers[il].is_loaded,
            }
            for il, stored in enumerate(shape.stored.layers)
        ],
    }


def _layer_kind(shape: ModelShape, il: int) -> str:
    layer = shape.arch.layers[il]
    if layer.is_recurrent:
        return "recurrent and attention" if layer.is_attention else "recurrent"
    if layer.is_attention:
        return "sliding window" if layer.is_swa else "attention"
    return "feed forward"


def _show_model(shape: ModelShape) -> None:
    from rich.console import Console
    from rich.table import Table

    from scheduler.units import format_bytes

    console = Console()
    facts = [
        f"{shape.architecture}, mostly {shape.quantization}",
        f"{format_bytes(shape.weights_bytes)} of weights in {shape.n_tensors} tensors and {len(shape.paths)} file(s)",
        f"trained on {shape.n_ctx_train} tokens of context",
        f"{shape.n_vocab} tokens in the vocabulary",
    ]
    if shape.is_moe:
        experts = format_bytes(shape.experts_bytes)
        facts.append(f"{shape.n_expert_used} of {shape.n_expert} experts used, {experts} in all")
    console.print(f"[bold]{shape.name or Path(shape.paths[0]).name}[/]: " + "; ".join(facts))
    if not shape.known_architecture:
        console.print(f"[yellow]{BOUND}[/]")
    table = Table("layers", "kind", "weights each", "experts each", title=f"{shape.n_layer_all} layers")
    rows = [
        (_layer_kind(shape, il), format_bytes(stored.weights), format_bytes(stored.experts) if stored.experts else "")
        for il, stored in enumerate(shape.stored.layers)
    ]
    first = 0
    for il in range(1, len(rows) + 1):
        if il == len(rows) or rows[il] != rows[first]:
            table.add_row(f"{first}" if il - first == 1 else f"{first} to {il - 1}", *rows[first])
            first = il
    console.print(table)
    console.print(
        f"before the layers {format_bytes(shape.stored.input)}, after them {format_bytes(shape.stored.output)}"
    )


def _show_costs(
    shape: ModelShape,
    cases: list[tuple[Layout, ContextParams]],
    results: list[Footprint],
    measured: list[MeasuredLoad | None],
) -> None:
    from rich.console import Console
    from rich.table import Table

    from scheduler.costs.footprint import computes_exactly, effective_context
    from scheduler.units import format_bytes

    console = Console()
    if not shape.known_architecture:
        console.print(f"[yellow]{shape.architecture}: {BOUND}[/]")
    table = Table("case", "where", "weights", "cache", "compute", "output", "all")
    for number, ((layout, context), result, load) in enumerate(zip(cases, results, measured, strict=True)):
        size = effective_context(shape, context)
        case = f"{number}: {size.n_seq_max} x {size.n_ctx_seq} tokens"
        for device, b in zip(layout.devices, result.devices, strict=True):
            parts = (b.weights_bytes, b.kv_bytes, b.compute_bytes)
            table.add_row(case, device.name, *map(format_bytes, parts), "", format_bytes(b.total_bytes))
            case = ""
        _add_host(table, case, "host", result)
        if load is not None:
            times = "once" if load.loads == 1 else f"{load.loads} times"
            for device, b in zip(layout.devices, load.buffers.devices, strict=True):
                parts = (b.weights_bytes, b.kv_bytes, b.compute_bytes)
                table.add_row(
                    f"measured {times}", device.name, *map(format_bytes, parts), "", format_bytes(b.total_bytes)
                )
            _add_host(table, f"measured {times}", "host", load.buffers)
        table.add_section()
    console.print(table)
    if shape.known_architecture:
        compute = (
            "compute buffers too" if computes_exactly(shape) else "compute buffers are a bound that no load exceeds"
        )
        console.print(f"weights, cache and output are to the byte, {compute}")


def _add_host(table: Table, case: str, where: str, result: Footprint) -> None:
    from scheduler.units import format_bytes

    host = result.host
    parts = (host.weights_bytes, host.kv_bytes, host.compute_bytes, host.output_bytes, host.total_bytes)
    table.add_row(case, where, *map(format_bytes, parts))
