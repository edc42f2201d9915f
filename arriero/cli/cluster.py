"""`arriero up`, `down` and `demo`: the service's life."""

from __future__ import annotations

import contextlib
import importlib.metadata
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from actors.gateway.address import check_exposure
from arriero.cli.printing import console, styled
from arriero.cli.service import client
from scheduler.config import Catalogue, parse_catalogue
from scheduler.errors import ArrieroError, Rejected
from scheduler.units import parse_bytes

DEFAULT_FILES = (Path("arriero.yaml"), Path("~/.config/arriero/arriero.yaml"))

FOLLOW_AGAIN_S = 1.0

DEFAULT_MODELS = "~/models"  # on each node

Address = Annotated[
    str | None, typer.Option("--address", help="Ray cluster to join; default: RAY_ADDRESS, then this machine's.")
]


def up(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--models", "-m", help="Directory, file or glob of GGUF models on the nodes (~/models); may be repeated."
        ),
    ] = None,
    catalogue: Annotated[
        Path | None,
        typer.Option(
            "--catalogue", "-c", help="Catalogue file; default: ./arriero.yaml, ~/.config/arriero/arriero.yaml."
        ),
    ] = None,
    address: Address = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; other addresses than loopback need an API key.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on (11535); 0: any free one.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="ARRIERO_API_KEY", help="Key that clients must send.")] = None,
    virtual_gpus: Annotated[
        str | None,
        typer.Option(help="Loopback devices instead of GPUs, such as 96MiB,64MiB; they need no card."),
    ] = None,
    single: Annotated[
        bool, typer.Option("--single", help="Single active model: each load evicts the previous one.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return at once and leave it running.")] = False,
) -> None:
    """Start Arriero on this machine's Ray cluster if there is one, else on a Ray of its own.

    With the same settings and code, repeating it changes nothing. With others, it replaces the running version.
    """
    settings = _settings(models, catalogue, host, port, api_key, virtual_gpus, single)
    check_exposure(settings.server.host, settings.server.keys)
    check_packages()
    from arriero import machine

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a Ray half started is ended
    with console.status("connecting to Ray, or starting it (5 to 30 s)") as status, machine.alone(status.update):
        known = machine.recall()
        state = machine.connect(address, start=True)
        from actors.bootstrap import bring_up  # imports Ray, which reads its token then

        try:
            deployment = bring_up(settings, say=status.update)
        except BaseException:
            if state.ray_pid and state != known:
                machine.end_ray(state)
            raise
        import ray

        ray.shutdown()  # the service needs no driver
        key = next(iter(settings.server.keys.values()), "")
        machine.remember(replace(state, url=deployment.url, api_key=key))
    verb = "was already running" if deployment.found else "replaced the old version" if deployment.replaced else "is up"
    console.print(styled(f"Arriero {verb} at [bold]{{0}}[/] (OpenAI base URL: {{0}}/v1)", deployment.url))
    if detach:
        console.print("It runs without this terminal. `arriero ps` shows it, `arriero down` stops it.", style="dim")
    else:
        _follow(deployment.url)
        down(address=address, keep_ray=False)


def down(
    address: Address = None,
    keep_ray: Annotated[bool, typer.Option("--keep-ray", help="Keep the Ray that `arriero up` started.")] = False,
) -> None:
    """Stop Arriero: unload models, end its actors, and end the Ray that `arriero up` started here."""
    from arriero import machine

    with console.status("stopping Arriero") as status, machine.alone(status.update):
        known = machine.recall()
        chosen = machine.cluster_address(address) or known.ray_address
        if not chosen or (chosen in (machine.LOCAL, known.ray_address) and known.ray_pid and not known.ray_process):
            machine.forget()
            console.print("No Arriero was started from here. `arriero down --address HOST:PORT` names another cluster.")
            return
        state = machine.connect(chosen, start=False)
        import ray

        from actors.bootstrap import take_down

        was_up = take_down(say=status.update)
        ray.shutdown()
        if not keep_ray and state.ray_pid and state == known:
            machine.end_ray(state)
        if keep_ray and state.ray_pid:
            machine.remember(replace(state, url="", api_key=""))
        else:
            machine.forget()
    console.print("Arriero is down." if was_up else "Arriero was not running.")


def demo(
    models: Annotated[
        Path | None, typer.Option("--models", help="Use the GGUF files of this directory instead.")
    ] = None,
) -> None:
    """Show everything on this machine: several models, too little memory for all of them. Every answer is checked."""
    check_packages()
    from arriero.demo import run_demo

    raise typer.Exit(run_demo(models))


def check_packages() -> None:
    """Refuse to run where another distribution's `scheduler` or `actors` package is found first; names the culprit."""
    import actors
    import scheduler

    home = Path(__file__).parents[2]
    for package in (scheduler, actors):
        found = Path(str(package.__file__)).parents[1]
        if found != home:
            name = package.__name__
            owners = set(importlib.metadata.packages_distributions().get(name, ())) - {"arriero"}
            culprit = f"the distribution {', '.join(sorted(owners))}" if owners else str(found)
            raise Rejected(
                f"the package {name!r} in this Python environment belongs to {culprit}, not to Arriero; "
                "install Arriero in a separate environment"
            )


def load_catalogue(path: Path | None) -> Catalogue:
    """The catalogue in `path` or in the default places; an empty one when there is none. Raises Rejected."""
    from arriero.cli.described import read_yaml

    chosen = path or next((file.expanduser() for file in DEFAULT_FILES if file.expanduser().is_file()), None)
    if chosen is None:
        return Catalogue()
    return parse_catalogue(read_yaml(chosen), str(chosen))


def _settings(
    models: list[str] | None,
    catalogue: Path | None,
    host: str | None,
    port: int | None,
    api_key: str | None,
    virtual_gpus: str | None,
    single: bool,
) -> Catalogue:
    """The catalogue with the command line's options over it."""
    settings = load_catalogue(catalogue)
    server: dict[str, Any] = {"host": host, "port": port, "api_key": api_key}
    update: dict[str, Any] = {
        "server": settings.server.model_copy(update={key: value for key, value in server.items() if value is not None})
    }
    if models:
        update["model_paths"] = (*settings.model_paths, *(str(Path(path).expanduser().absolute()) for path in models))
    if virtual_gpus:
        try:
            update["virtual_gpus"] = tuple(parse_bytes(size) for size in virtual_gpus.split(","))
        except ValueError as error:
            raise Rejected(f"--virtual-gpus: {error}") from error
    if single:
        update["policy"] = settings.policy.model_copy(update={"max_active_models": 1})
    settings = settings.model_copy(update=update)
    if not settings.model_paths and not settings.models:
        settings = settings.model_copy(update={"model_paths": (DEFAULT_MODELS,)})
    # Once more through validation: options must meet the same rules as the file.
    return parse_catalogue(settings.model_dump(), "options")


def _follow(url: str) -> None:
    """Print events until interrupted."""
    from arriero.cli.observe import print_notice

    stop = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.set())

    def follow() -> None:
        seen = 0
        while not stop.is_set():
            with contextlib.suppress(ArrieroError), client(url) as api:  # a gateway may be started again
                for notice in api.events(after=seen):
                    print_notice(notice)
                    seen = notice.seq
            stop.wait(FOLLOW_AGAIN_S)

    threading.Thread(target=follow, daemon=True).start()
    console.print("Ctrl-C stops Arriero.", style="dim")
    stop.wait()
