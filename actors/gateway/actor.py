"""The gateway actor: uvicorn on the event loop of an async Ray actor.

Everything starts in the constructor, because that is all Ray runs again when it restarts the actor; a port that is
taken or an unsafe binding therefore fails the creation. HTTP requests are tasks of uvicorn's, not calls of the actor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.devices.pulse import LOOP_EVERY_S, LOOP_WITHIN_S, sign_in
from actors.gateway.address import DEFAULT_PORT, check_exposure
from actors.gateway.app import make_app
from actors.gateway.ray_backend import RayBackend
from actors.gateway.server import listen, make_server, url_of
from scheduler.units import NodeId


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Where to listen, and the key to ask for. `port` 0 takes any free one; `more_ports`: those beside it;
    `media_hosts`: where pictures are fetched from."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    api_keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    more_ports: tuple[int, ...] = ()
    media_hosts: tuple[str, ...] = ()


@ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=100)
class GatewayActor:
    """Create it detached, by name, with hard affinity to the head node, whose address people know.

    Raises Rejected (inside Ray's ActorDiedError) when it cannot or must not listen there.
    """

    def __init__(self, settings: GatewaySettings, scheduler: ActorHandle[Any]) -> None:
        check_exposure(settings.host, settings.api_keys)
        listeners = [listen(settings.host, port) for port in (settings.port, *settings.more_ports)]
        self._url = url_of(listeners[0])
        scheduler.forget_clients.remote()  # those of a gateway before this one
        node_id = ray.get_runtime_context().get_node_id()
        backend = RayBackend(scheduler, NodeId(node_id))
        self._server = make_server(make_app(backend, settings.api_keys, media_hosts=settings.media_hosts))
        self._serving = asyncio.ensure_future(self._server.serve(sockets=listeners))
        self._pulse = sign_in(node_id, "GatewayActor", "a turn of its event loop")
        self._beating = asyncio.ensure_future(self._beat())

    async def _beat(self) -> None:
        while True:
            self._pulse.promise(LOOP_WITHIN_S)
            await asyncio.sleep(LOOP_EVERY_S)

    async def url(self) -> str:
        """Where it listens, as seen from its own machine."""
        return self._url

    async def close(self) -> None:
        """Stop listening. Requests under way are told that it ends, and new ones refused."""
        self._server.close()
        await self._serving
