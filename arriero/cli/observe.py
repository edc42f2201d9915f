"""`arriero ps`, `gpus`, `models`, `events` and `why`: what is where, and why."""

from __future__ import annotations

import datetime
from typing import Annotated

import typer
from rich.table import Column, Table

from arriero.api import GpuStatus, Notice, ProjectorShare, ReplicaStatus
from arriero.cli.printing import AsJson, console, print_json, styled
from arriero.cli.service import Url, client
from scheduler.errors import UnknownModel
from scheduler.units import format_bytes

COLOURS = {
    "placed": "cyan", "replica_ready": "green", "replica_evicted": "yellow", "replica_died": "red",
    "load_failed": "red", "request_refused": "red", "model_invalid": "red", "gpu_lost": "red", "node_lost": "red",
}  # fmt: skip


GPU_FIGURES = ("total", "free", "booked", "others", "load", "temp")


def _name_column() -> Column:
    """Names are there to be typed again: never cut."""
    return Column("model", no_wrap=True, overflow="ignore")


def ps(url: Url = None, json: AsJson = False) -> None:
    """Show loaded models, where they are, and what waits."""
    with client(url) as api:
        status = api.status()
    if json:
        print_json(status)
        return
    title = f"Loaded models ({status.mode})"
    table = Table(_name_column(), "state", "where", "n_ctx", "slots", "threads", "idle", title=title)
    for replica in status.replicas:
        table.add_row(
            styled("{} [dim](pinned)[/]", replica.model) if replica.pinned else replica.model,
            replica.state if replica.loading is None else f"loading {replica.loading:.0%}",
            where(replica),
            str(replica.n_ctx),
            f"{replica.active}/{replica.slots}",
            str(replica.n_threads),
            "busy"
            if replica.idle_s is None and replica.active
            else f"{replica.idle_s:.0f} s"
            if replica.idle_s is not None
            else "",
        )
    console.print(table if status.replicas else "No model is loaded.")
    for entry in status.queue:
        console.print(
            styled("[yellow]waiting {} s[/] for {}: {}", f"{entry.waited_s:.0f}", entry.model, entry.reason),
            soft_wrap=True,
        )
    for node in status.nodes:
        available, total = format_bytes(node.memory_available_bytes), format_bytes(node.memory_total_bytes)
        figures = (
            f"{available} of {total} RAM available, {format_bytes(node.memory_reserved_bytes)} booked; "
            f"{node.physical_cores} cores"
        )
        console.print(f"{node.hostname}: {figures}", style="dim")


def gpus(url: Url = None, json: AsJson = False) -> None:
    """Show GPUs: total, free and booked memory, and what other programs use."""
    with client(url) as api:
        status = api.status()
    if json:
        print_json(status.gpus)
        return
    figures = [_gpu_figures(gpu) for gpu in status.gpus]
    shown = [name for name in GPU_FIGURES if any(row[name] for row in figures)]
    table = Table("gpu", "product", *(Column(name, no_wrap=True) for name in shown), "state")
    for gpu, row in zip(status.gpus, figures, strict=True):
        state = gpu.state + (f": {gpu.reason}" if gpu.reason else "")
        table.add_row(gpu.label, gpu.product, *(row[name] for name in shown), state)
    console.print(table if status.gpus else "No GPU: models run in host RAM.")


def models(url: Url = None, json: AsJson = False) -> None:
    """List the models that you can request."""
    with client(url) as api:
        found = api.models()
    if json:
        print_json(found)
        return
    table = Table(_name_column(), "architecture", "type", "size", "n_ctx per slot", "loaded")
    for model in found:
        if model.state != "invalid":
            table.add_row(
                model.name,
                model.architecture or "",
                model.quantization or "",
                format_bytes(model.size_bytes) if model.size_bytes is not None else "",
                str(model.n_ctx or ""),
                "yes" if model.replicas else "",
            )
    console.print(table if found else "No models found; `arriero up --models DIR` names a directory.")
    for model in found:
        if model.reason:
            console.print(styled("[red]{}[/]: {}", model.name, model.reason), soft_wrap=True)


def why(
    replica: Annotated[
        str, typer.Argument(help="A replica, as in `arriero ps --json`, or a model: its newest replica.")
    ],
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Show the history of a replica: why it was placed there, how it loaded, and why it ended."""
    with client(url) as api:
        notices = list(api.events(follow=False))
    ids = [
        notice.replica_id for notice in notices if replica in (notice.replica_id, notice.model) and notice.replica_id
    ]
    if not ids:
        raise UnknownModel(f"no notices about a replica or model {replica!r}; see `arriero events`")
    for notice in notices:
        if notice.replica_id == ids[-1]:
            print_json(notice, indent=None) if json else print_notice(notice)


def events(
    model: Annotated[str | None, typer.Option(help="Only events of this model.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for new events.")] = False,
    after: Annotated[int, typer.Option(help="Only events after this number.")] = 0,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Show what happened: placements, evictions, loads, refusals, each with its reason."""
    with client(url) as api:
        for notice in api.events(after=after, follow=follow):
            if model is not None and notice.model != model:
                continue
            if json:
                print_json(notice, indent=None)
            else:
                print_notice(notice)


def print_notice(notice: Notice) -> None:
    at = datetime.datetime.fromtimestamp(notice.at_s).strftime("%H:%M:%S")
    colour = COLOURS.get(notice.kind, "default")
    template = f"[dim]{at}[/] [{colour}]{{}}[/] {{}}"
    console.print(styled(template, f"{notice.kind:<16}", notice.message), soft_wrap=True)


def where(replica: ReplicaStatus) -> str:
    """ "7 layers on gpu0, 3 in host RAM, projector on gpu0" """
    shares = [
        f"{share.layers} in host RAM" if share.device == "host" else f"{share.layers} layers on {share.device}"
        for share in replica.layout
        if share.layers
    ]
    if replica.experts_on_host:
        shares.append("experts in host RAM")
    if replica.projector:
        shares.append(f"projector {place_of(replica.projector)}")
    return ", ".join(shares)


def place_of(projector: ProjectorShare) -> str:
    """ "on gpu0" or "in host RAM" """
    return "in host RAM" if projector.device == "host" else f"on {projector.device}"


def _gpu_figures(gpu: GpuStatus) -> dict[str, str]:
    """By column; empty where the device does not say."""
    return {
        "total": format_bytes(gpu.total_bytes),
        "free": format_bytes(gpu.free_bytes),
        "booked": format_bytes(gpu.booked_bytes),
        "others": format_bytes(gpu.foreign_bytes),
        "load": f"{gpu.utilisation:.0%}" if gpu.utilisation is not None else "",
        "temp": f"{gpu.temperature_c:.0f} °C" if gpu.temperature_c is not None else "",
    }
