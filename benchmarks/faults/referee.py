"""Looks whether all came to rest: nobody waits, nothing is held for nobody, and all memory comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from arriero import AsyncClient
from arriero.api import ArrieroError, GpuStatus, Status, UnknownModel

REST_S = 90.0  # a lease that nobody renews is taken back after 60 s
LOOK_EVERY_S = 0.5


class Referee:
    """`violations`: what did not come to rest, in words."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.violations: list[str] = []

    async def come_to_rest(self) -> None:
        """All clients have gone: the queue empties, and slots are free."""
        await self._until(lambda status: [f"{each.model} waits: {each.reason}" for each in status.queue])
        await self._until(
            lambda status: [f"{r.replica_id} has {r.active} busy slots" for r in status.replicas if r.active]
        )
        await self._until(
            lambda status: [f"{r.replica_id} is {r.state} for ever" for r in status.replicas if r.state != "ready"]
        )
        await self._until(lambda status: [said for gpu in status.gpus if (said := _unbooked(gpu))])

    async def unload(self, models: tuple[str, ...]) -> None:
        async with AsyncClient(self._url) as client:
            for model in models:
                try:
                    await client.unload(model)
                except UnknownModel as error:
                    self.violations.append(error.message)
        await self._until(lambda status: [f"{r.replica_id} is not unloaded" for r in status.replicas])
        await self._until(
            lambda status: [
                f"{gpu.label} shows {gpu.total_bytes - gpu.free_bytes} bytes in use, {gpu.booked_bytes} booked"
                for gpu in status.gpus
                if gpu.free_bytes != gpu.total_bytes or gpu.booked_bytes
            ]
        )

    async def _until(self, wrong: Callable[[Status], list[str]]) -> None:
        """Wait until nothing is wrong any more; what still is after `REST_S` is a violation."""
        deadline, found = time.monotonic() + REST_S, ["the gateway does not answer"]
        async with AsyncClient(self._url) as client:
            while found and time.monotonic() < deadline:
                try:
                    found = wrong(await client.status())
                except ArrieroError as error:
                    found = [error.message]
                if found:
                    await asyncio.sleep(LOOK_EVERY_S)
        self.violations += found


def _unbooked(gpu: GpuStatus) -> str:
    """Nobody else uses virtual GPUs here: what they show is booked, and none of it counts as somebody else's."""
    used = gpu.total_bytes - gpu.free_bytes
    if used <= gpu.booked_bytes and not gpu.foreign_bytes:
        return ""
    return f"{gpu.label} shows {used} bytes in use, {gpu.booked_bytes} are booked, {gpu.foreign_bytes} are others'"
