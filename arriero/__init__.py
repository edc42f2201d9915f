"""Arriero: a cluster scheduler for GGUF models.

    from arriero import Client
    print(Client().chat("my-model", "Hello!").text)

Importing this package is cheap: neither Ray nor llama.cpp, and the clients only when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arriero.client import AsyncClient, Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("AsyncClient", "Client"):
        from arriero import client

        return getattr(client, name)
    raise AttributeError(f"module 'arriero' has no attribute {name!r}")
