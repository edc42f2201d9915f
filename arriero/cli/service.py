"""How commands reach the gateway."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from arriero.client import Client
from arriero.machine import recall

Url = Annotated[
    str | None, typer.Option("--url", envvar="ARRIERO_URL", help="The gateway; default: the last one started here.")
]


def client(url: str | None) -> Client:
    """A client for `url`, or for the deployment that was last brought up from this account."""
    remembered = recall()
    key = os.environ.get("ARRIERO_API_KEY") or (remembered.api_key if not url or url == remembered.url else "")
    return Client(url or remembered.url or None, api_key=key or None)
