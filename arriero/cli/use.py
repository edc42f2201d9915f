"""`arriero run`, `chat`, `load`, `unload` and `pin`."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from arriero.api import ArrieroError
from arriero.cli.printing import AsJson, console, errors, print_json, print_piece, styled
from arriero.cli.service import Url, client
from arriero.client import Client, TextStream

MaxTokens = Annotated[int | None, typer.Option(help="Maximum number of tokens.")]
Temperature = Annotated[float | None, typer.Option(help="0: always the most probable token.")]
LOOK_EVERY_S = 0.3


def run(
    model: str,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads standard input.")],
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    url: Url = None,
) -> None:
    """Send one prompt to MODEL and stream the answer."""
    text = sys.stdin.read() if prompt == "-" else prompt
    with client(url) as api:
        _answer(api, model, [{"role": "user", "content": text}], max_tokens, temperature, url)


def chat(model: str, max_tokens: MaxTokens = None, temperature: Temperature = None, url: Url = None) -> None:
    """Chat with MODEL. Ctrl-C cancels an answer, Ctrl-D ends the chat."""
    messages: list[dict[str, str]] = []
    with client(url) as api:
        api.plan(model)  # a model that does not exist is said before anything is typed
        console.print(f"{model}: Ctrl-C cancels an answer, Ctrl-D ends the chat.", style="dim")
        while True:
            try:
                messages.append({"role": "user", "content": console.input(styled("[bold cyan]> [/]"))})
                text = _answer(api, model, messages, max_tokens, temperature, url)
                messages.append({"role": "assistant", "content": text})
            except KeyboardInterrupt:
                console.print()
                console.print("(cancelled)", style="dim")
                messages = messages[:-1]
            except EOFError:
                console.print()
                return


def load(
    model: str,
    n_ctx: Annotated[int | None, typer.Option(help="Tokens that a slot must hold.")] = None,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Load MODEL now, before the first request."""
    with client(url) as api, _progress(model, url):
        result = api.load(model, n_ctx=n_ctx)
    if json:
        print_json(result)
        return
    took = f"loaded in {result.load_s:.1f} s" if result.load_s else "was already loaded"
    console.print(f"{model} {took} on {result.node}, {result.n_ctx} tokens of context")


def unload(model: str, url: Url = None, json: AsJson = False) -> None:
    """Unload MODEL and free its memory. Running requests finish first."""
    with client(url) as api:
        result = api.unload(model)
    if json:
        print_json(result)
    else:
        console.print(f"{model}: unloading" if result.replicas else f"{model} is not loaded")


def pin(
    model: str,
    off: Annotated[bool, typer.Option("--off", help="Allow eviction again.")] = False,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Never evict MODEL once it is loaded."""
    with client(url) as api:
        result = api.pin(model, not off)
    if json:
        print_json(result)
    else:
        console.print(f"{model} is {'pinned' if result.pinned else 'no longer pinned'}")


def _answer(
    api: Client,
    model: str,
    messages: list[dict[str, str]],
    max_tokens: int | None,
    temperature: float | None,
    url: str | None,
) -> str:
    """Stream one answer to the terminal; shows the load while a cold model is waited for."""
    pieces: list[str] = []
    options: Any = {
        key: value for key, value in (("max_tokens", max_tokens), ("temperature", temperature)) if value is not None
    }
    waiting = contextlib.ExitStack()
    try:
        with waiting:
            waiting.enter_context(_progress(model, url))
            with api.chat(model, messages, stream=True, **options) as stream:
                for piece in stream:
                    waiting.close()
                    pieces.append(piece)
                    print_piece(piece)
    finally:
        if pieces:
            print()
    if not pieces:
        errors.print(f"{model} {_nothing(stream)}", style="dim", soft_wrap=True)
    return "".join(pieces)


def _nothing(stream: TextStream) -> str:
    """Why the whole answer is empty."""
    if stream.finish_reason == "length":
        return "used all its tokens without any text; --max-tokens allows more"
    if stream.reasoning:
        return "wrote only reasoning, and no answer"
    return "gave an empty answer: it ended at once"


@contextlib.contextmanager
def _progress(model: str, url: str | None) -> Iterator[None]:
    """A bar on standard error for as long as `model` waits or loads; nothing when it is loaded or nobody looks."""
    if not sys.stderr.isatty():
        yield
        return
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(model, url, done), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _watch(model: str, url: str | None, done: threading.Event) -> None:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    if done.wait(LOOK_EVERY_S):
        return
    with client(url) as api, Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(f"{model}: waiting", total=1.0)
        while not done.wait(LOOK_EVERY_S):
            with contextlib.suppress(ArrieroError):
                status = api.status()
                loading = next((r for r in status.replicas if r.model == model and r.loading is not None), None)
                queued = next((q for q in status.queue if q.model == model), None)
                if loading is not None:
                    bar.update(task, completed=loading.loading or 0.0, description=f"{model}: loading")
                elif queued is not None:
                    bar.update(task, description=f"{model}: {queued.reason}")
