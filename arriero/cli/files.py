"""`arriero inspect` and `arriero footprint`: what a GGUF file is and what it would cost, read from its header alone.

Neither talks to a service or starts Ray; both answer in a fraction of a second, unless llama.cpp is asked (`--verify`)
or the file is on a hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arriero.cli.printing import AsJson, print_json
from arriero.cli.shapes import read_model
from scheduler.errors import Rejected

if TYPE_CHECKING:
    from arriero.cli.bill import Bill
    from scheduler.costs.companions import Companions
    from scheduler.costs.measurements import MeasuredLoad
    from scheduler.costs.params import Footprint, Layout
    from scheduler.costs.shape import ModelShape

Lora = Annotated[list[Path] | None, typer.Option(help="A LoRA adapter; may be repeated.")]
Mmproj = Annotated[Path | None, typer.Option(help="A projector for images or audio.")]
Draft = Annotated[Path | None, typer.Option(help="A draft model for speculative decoding.")]
Mtp = Annotated[bool, typer.Option("--mtp", help="Load and run the model's own prediction layers.")]
File = Annotated[
    Path,
    typer.Argument(
        help="A GGUF file (for a model in several parts, any part), or hf:org/repo:Q4_K_M.", show_default=False
    ),
]


def inspect(file: File, json: AsJson = False) -> None:
    """Show what a GGUF file contains: architecture, layers and their bytes."""
    from actors.measurements import llama_build

    shape = read_model(file)
    if json:
        print_json(_describe(shape, llama_build()))
    else:
        from arriero.cli.cost_tables import show_model

        show_model(shape)


def footprint(
    file: File,
    grid: Annotated[
        Path | None, typer.Option(help="JSON file with a list of layouts and contexts; each gets its own figures.")
    ] = None,
    lora: Lora = None,
    mmproj: Mmproj = None,
    draft: Draft = None,
    mtp: Mtp = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also ask the llama.cpp of this machine; it must have the devices.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Show the bytes that a model takes per device and in host RAM, with the files that come with it."""
    from actors.hub import is_on_a_hub
    from actors.measurements import llama_build
    from arriero.cli.bill import make_bill
    from arriero.cli.cost_tables import show_costs
    from arriero.cli.grid import read_grid
    from scheduler.costs.companions import accompanied

    companions = read_companions(lora or [], mmproj, draft, mtp)
    shape = accompanied(read_model(file), companions)
    cases = read_grid(grid)
    build = llama_build()
    bills = []
    for index, case in enumerate(cases):
        try:
            bills.append(make_bill(shape, companions, case, build))
        except Rejected as error:
            raise Rejected(f"grid[{index}]: {error.message}") from None
    if verify and is_on_a_hub(str(file)):
        raise Rejected("--verify needs the file on this machine: llama.cpp reads it")
    if verify and (lora or mtp):
        raise Rejected("--verify asks llama.cpp about the model alone: leave out --lora and --mtp")
    if verify:
        from arriero.cli.verify import verified

        bills = [verified(file, bill, case) for bill, case in zip(bills, cases, strict=True)]
    measured = _measured(shape, bills, build)
    if json:
        answers = [_answer_bill(shape, bill, load, build) for bill, load in zip(bills, measured, strict=True)]
        print_json(answers)
    else:
        show_costs(shape, bills, measured, build)


def read_companions(loras: list[Path], mmproj: Path | None, draft: Path | None, mtp: bool) -> Companions:
    """What these options name. Raises Rejected when a file cannot be read, InvalidGGUF when it is none of its kind."""
    from scheduler.costs.adapter import read_adapter
    from scheduler.costs.companions import Companions
    from scheduler.costs.projector import read_projector

    try:
        adapters = tuple(map(read_adapter, loras))
        projector = read_projector(mmproj) if mmproj else None
    except OSError as error:
        raise Rejected(f"{error.filename}: {error.strerror or error}") from None
    return Companions(adapters, projector, read_model(draft) if draft else None, mtp)


def _measured(shape: ModelShape, bills: list[Bill], build: str) -> list[MeasuredLoad | None]:
    """What real loads took, where this machine is the head and has seen the same load before."""
    import sqlite3

    from actors.measurements import measurements_path, read_measurements
    from scheduler.costs.measurements import Measurements

    try:
        memory = Measurements(read_measurements(measurements_path()))
    except (OSError, sqlite3.Error):
        memory = Measurements()  # a service that starts sets a damaged file aside, and says so
    return [memory.load(shape, bill.layout, bill.context, build) for bill in bills]


def _sources(shape: ModelShape, build: str) -> dict[str, str]:
    """Where each figure comes from: llama.cpp's own rules, its graph redrawn, or a bound that no load exceeds."""
    from scheduler.costs.footprint import computes_exactly

    rules = "rules" if shape.known_architecture else "bound"
    compute = "graph" if computes_exactly(shape, build) else "bound"
    return {"weights": rules, "kv": rules, "compute": compute, "output": rules}


def _measured_answer(layout: Layout, load: MeasuredLoad | None) -> dict[str, Any] | None:
    if load is None:
        return None
    outside = {device.name: count for device, count in zip(layout.devices, load.outside_bytes, strict=True)}
    return _answer(layout, load.buffers) | {"loads": load.loads, "outside_buffers_bytes": outside}


# ---- answers ---------------------------------------------------------------------------------------------------------


def _answer_bill(shape: ModelShape, bill: Bill, load: MeasuredLoad | None, build: str) -> dict[str, Any]:
    from dataclasses import asdict

    answer = _answer(bill.layout, bill.cost)
    if bill.beside:
        answer["beside"] = {name: _answer(bill.layout, cost) for name, cost in bill.beside.items()}
    answer["host_ram"] = {
        "steady_bytes": bill.steady_bytes,
        "peak_bytes": bill.peak_bytes,
        "mapped_bytes": bill.mapped_bytes,
        "parts": asdict(bill.host),
    }
    if bill.verified is not None:
        answer["verified"] = _answer(bill.layout, bill.verified)
    elif bill.unverified:
        answer["verified"] = {"error": bill.unverified}
    return answer | {"sources": _sources(shape, build), "measured": _measured_answer(bill.layout, load)}


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


def _describe(shape: ModelShape, build: str) -> dict[str, Any]:
    from arriero.cli.cost_tables import layer_kind
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
        "compute_is_exact": computes_exactly(shape, build),
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
                "kind": layer_kind(shape, il),
                "loaded": shape.arch.layers[il].is_loaded,
            }
            for il, stored in enumerate(shape.stored.layers)
        ],
    }
