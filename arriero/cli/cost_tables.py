"""What `arriero inspect` and `arriero footprint` print for people."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from arriero.cli.bill import Bill
from arriero.cli.printing import console, styled
from scheduler.costs.footprint import computes_exactly, effective_context
from scheduler.costs.measurements import MeasuredLoad
from scheduler.costs.params import Footprint
from scheduler.costs.shape import ModelShape
from scheduler.units import format_bytes

BOUND = "no formulas for this architecture, so every figure is a cautious upper bound"


def layer_kind(shape: ModelShape, il: int) -> str:
    layer = shape.arch.layers[il]
    if layer.is_recurrent:
        return "recurrent and attention" if layer.is_attention else "recurrent"
    if layer.is_attention:
        return "sliding window" if layer.is_swa else "attention"
    return "feed forward"


def show_model(shape: ModelShape) -> None:
    facts = [
        f"{shape.architecture}, mostly {shape.quantization}",
        f"{format_bytes(shape.weights_bytes)} of weights in {shape.n_tensors} tensors and {len(shape.paths)} file(s)",
        f"trained on {shape.n_ctx_train} tokens of context",
        f"{shape.n_vocab} tokens in the vocabulary",
    ]
    if shape.is_moe:
        experts = format_bytes(shape.experts_bytes)
        facts.append(f"{shape.n_expert_used} of {shape.n_expert} experts used, {experts} in all")
    console.print(styled("[bold]{}[/]: {}", shape.name or Path(shape.paths[0]).name, "; ".join(facts)))
    if not shape.known_architecture:
        console.print(BOUND, style="yellow")
    table = Table("layers", "kind", "weights each", "experts each", title=f"{shape.n_layer_all} layers")
    rows = [
        (layer_kind(shape, il), format_bytes(stored.weights), format_bytes(stored.experts) if stored.experts else "")
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


def show_costs(shape: ModelShape, bills: list[Bill], measured: list[MeasuredLoad | None], build: str) -> None:
    """A table with a section per case, and what host RAM the process takes, under this build of llama-cpp-python."""
    if not shape.known_architecture:
        console.print(f"{shape.architecture}: {BOUND}", style="yellow")
    table = Table("case", "where", "weights", "cache", "compute", "output", "all")
    for number, (bill, load) in enumerate(zip(bills, measured, strict=True)):
        size = effective_context(shape, bill.context)
        names = [device.name for device in bill.layout.devices]
        _add_rows(table, f"{number}: {size.n_seq_max} x {size.n_ctx_seq} tokens", names, bill.cost)
        for companion, cost in bill.beside.items():
            _add_rows(table, f"+ {companion}", names, cost)
        if load is not None:
            times = "once" if load.loads == 1 else f"{load.loads} times"
            _add_rows(table, f"measured {times}" if load.loads else "asked llama.cpp", names, load.buffers)
        if bill.verified is not None:
            _add_rows(table, "llama.cpp says", names, bill.verified)
        table.add_section()
    console.print(table)
    for number, bill in enumerate(bills):
        ram, most = format_bytes(bill.steady_bytes), format_bytes(bill.peak_bytes)
        mapped = format_bytes(bill.mapped_bytes)
        console.print(f"case {number}: the process keeps {ram} of host RAM, {most} while loading, and maps {mapped}")
        if bill.unverified:
            console.print(f"case {number}: {bill.unverified}", style="yellow")
    if shape.known_architecture:
        compute = (
            "compute buffers too"
            if computes_exactly(shape, build)
            else "compute buffers are an upper bound that no load exceeds"
        )
        console.print(f"weights, cache and output are exact to the byte, {compute}")


def _add_rows(table: Table, case: str, names: list[str], cost: Footprint) -> None:
    for name, device in zip(names, cost.devices, strict=True):
        parts = (device.weights_bytes, device.kv_bytes, device.compute_bytes)
        table.add_row(case, name, *map(format_bytes, parts), "", format_bytes(device.total_bytes))
        case = ""
    host = cost.host
    shares = (host.weights_bytes, host.kv_bytes, host.compute_bytes, host.output_bytes, host.total_bytes)
    table.add_row(case, "host", *map(format_bytes, shares))
