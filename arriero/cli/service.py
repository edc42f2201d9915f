"""How commands reach the gateway, and how they print."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Annotated

import typer
from pydantic import BaseModel
from rich.console import Console

from arriero.client import Client
from arriero.machine import recall

console = Console(highlight=False)

Url = Annotated[
    str | None, typer.Option("--url", envvar="ARRIERO_URL", help="The gateway; default: the last one brought up here.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def client(url: str | None) -> Client:
    """A client for `url`, or for the deployment that was last brought up from this account."""
    remembered = recall()
    key = os.environ.get("ARRIERO_API_KEY") or (remembered.api_key if not url or url == remembered.url else "")
    return Client(url or remembered.url or None, api_key=key or None)


def print_json(value: BaseModel | Sequence[BaseModel]) -> None:
    """JSON on standard output, nothing around it."""
    data = value.model_dump(mode="json") if isinstance(value, BaseModel) else [v.model_dump(mode="json") for v in value]
    print(json.dumps(data, indent=2))
