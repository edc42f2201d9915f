"""`arriero plan`: what a request would cause now, or on a cluster that is only described."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from actors.hub import is_on_a_hub
from arriero.api import Plan, PlanOption, PlanSpeed
from arriero.cli.files import Draft, Lora, Mmproj, Mtp
from arriero.cli.observe import place_of
from arriero.cli.price_table import PricedRow, price_table
from arriero.cli.printing import AsJson, console, print_json, styled
from arriero.cli.service import Url, client
from scheduler.errors import Rejected
from scheduler.units import format_bytes

if TYPE_CHECKING:
    from arriero.cli.described import Described


def plan(
    model: str,
    n_ctx: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens that a slot must hold. With --cluster, also: auto.")
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option(help="Plan for the cluster described in this file; MODEL is then a GGUF file, or on a hub."),
    ] = None,
    n_seq_max: Annotated[int | None, typer.Option(metavar="N", help="With --cluster: slots.")] = None,
    type_k: Annotated[str | None, typer.Option(metavar="TYPE", help="With --cluster: type of the K cache.")] = None,
    type_v: Annotated[str | None, typer.Option(metavar="TYPE", help="With --cluster: type of the V cache.")] = None,
    params: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="With --cluster: a parameter as in a catalogue; may be repeated."
        ),
    ] = None,
    lora: Lora = None,
    mmproj: Mmproj = None,
    draft: Draft = None,
    mtp: Mtp = False,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Show what a request for MODEL would cause now, or on a described cluster. Starts nothing.

    MODEL is a model of the service, or one on a hub that is not fetched yet: hf:org/repo:Q4_K_M.
    """
    options: dict[str, Any] = {"n_seq_max": n_seq_max, "type_k": type_k, "type_v": type_v}
    given = {key: value for key, value in options.items() if value is not None}
    if cluster is not None or is_on_a_hub(model):
        from arriero.cli.described import plan_for
        from arriero.cli.files import read_companions

        if n_ctx == "auto":
            given["n_ctx"], n_ctx = n_ctx, None
        companions = read_companions(lora or [], mmproj, draft, mtp)
        plan_for(
            model, described_cluster(cluster, url), tokens_of(n_ctx), _params(params or [], given), companions, json
        )
        return
    if given or params or lora or mmproj or draft or mtp:
        raise Rejected(
            "parameters and companion files work only with --cluster; otherwise the service uses its catalogue"
        )
    with client(url) as api:
        found = api.plan(model, n_ctx=tokens_of(n_ctx))
    if json:
        print_json(found)
    else:
        print_plan(found)


def described_cluster(spec: Path | None, url: str | None) -> Described:
    """The cluster that the file `spec` describes, or that of the service."""
    from arriero.cli.described import cluster_of, read_cluster

    if spec is not None:
        return read_cluster(spec)
    with client(url) as api:
        return cluster_of(api.status())


def tokens_of(n_ctx: str | None) -> int | None:
    """The number that an option says. Raises Rejected."""
    if n_ctx is None:
        return None
    if not n_ctx.isascii() or not n_ctx.isdigit() or int(n_ctx) < 1:
        raise Rejected(f"--n-ctx must be a number of tokens, or auto with --cluster, not {n_ctx!r}")
    return int(n_ctx)


def _params(texts: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """Parameters of the model as a catalogue file would give them, from "key=value" and options of their own."""
    import yaml

    found = dict(given)
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise Rejected(f"--set must be key=value, such as n_batch=512, not {text!r}")
        if key == "path":
            raise Rejected("--set path: the file is named by MODEL")
        if key in ("adapters", "mmproj", "model_draft"):
            raise Rejected(f"--set {key}: give the files with --lora, --mmproj and --draft")
        if key in found:
            raise Rejected(f"{key} is given twice")
        if key == "spec_type" and value.startswith("draft"):
            raise Rejected(f"--set spec_type={value}: give the draft with --draft, or --mtp")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise Rejected(f"--set {key}: {value!r} is not YAML; write lists as [a, b]") from None
    return found


def print_plan(found: Plan) -> None:
    """A plan as people read it: the verdict, the shares, the victims, and why better places were passed over."""
    verdicts = {
        "ready": "[green]has a replica[/]",
        "free": "[green]fits beside the others[/]",
        "evict": "[yellow]fits after evicting[/]",
        "wait": "[yellow]must wait for running requests[/]",
        "blocked": "[red]has no room now: pinned models or other programs are in the way[/]",
        "impossible": "[red]can never fit[/]",
    }
    place = f": {found.tier} on {found.node}" if found.tier else ""
    console.print(styled(f"[bold]{{}}[/] {verdicts[found.verdict]}{{}}", found.model, place))
    if found.shares:
        table = Table("device", "layers", "needs", "free before", "free after")
        for share in found.shares:
            free = (format_bytes(share.free_before_bytes), format_bytes(share.free_after_bytes))
            table.add_row(share.device, str(share.layers), format_bytes(share.bytes), *free)
        console.print(table)
    if found.draft:
        parts = [f"{format_bytes(count)} on {device}" for device, count in found.draft.bytes.items() if count]
        console.print(styled("of that, the draft {} takes {}", found.draft.path, ", ".join(parts)), soft_wrap=True)
    if found.projector:
        file, count = found.projector.path, format_bytes(found.projector.bytes)
        head = "of that, the projector" if found.shares else "its projector"
        console.print(styled("{} {} takes {} {}", head, file, count, place_of(found.projector)), soft_wrap=True)
    if found.speed:
        print_speed(found.speed)
    for victim in found.victims:
        frees = ", ".join(f"{format_bytes(count)} on {device}" for device, count in victim.frees.items())
        console.print(f"evicts {victim.model} (idle {victim.idle_s:.0f} s), which frees {frees}")
    if found.options:
        console.print(price_table("possible places now (seconds)", (_row(found, each) for each in found.options)))
    for way in found.would_fit_if:
        console.print(f"it would fit with: {way}", soft_wrap=True)
    for reason in found.reasons:
        console.print(f"- {reason}", style="dim", soft_wrap=True)


def _row(found: Plan, option: PlanOption) -> PricedRow:
    shares = ", ".join(f"{share.device}: {share.layers} ({format_bytes(share.bytes)})" for share in option.shares)
    evicts = f", evicting {', '.join(option.evicts)}" if option.evicts else ""
    chosen = (found.tier, found.node, sorted(victim.model for victim in found.victims))
    cost = option.cost_s
    return PricedRow(
        chosen == (option.tier, option.node, sorted(option.evicts)),
        f"{option.node} {shares}{evicts}",
        cost.wait,
        cost.release,
        cost.load,
        cost.service,
        cost.regret,
        cost.total,
        option.tokens_per_s,
    )


def print_speed(speed: PlanSpeed) -> None:
    """Predicted speeds with their error so far, or "not measured yet"."""
    parts = []
    for what, pace in (("answers", speed.answer), ("prompts", speed.prompt), ("loads in", speed.load)):
        if pace is not None:
            figure = f"{pace.seconds:.1f} s" if pace.seconds is not None else f"{pace.per_s:,.1f} tokens/s"
            times = "once" if pace.samples == 1 else f"{pace.samples} times"
            known = f"measured {times}" if pace.samples else "not measured yet"
            parts.append(f"{what} {figure} ({known}{'' if pace.error is None else f', off by {pace.error:.0%}'})")
    console.print("predicted: " + ", ".join(parts), soft_wrap=True)
