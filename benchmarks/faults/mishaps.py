"""What goes wrong: processes of the service that are killed, or stopped for a while."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter

import httpx
import psutil

TARGETS = {
    "a runner": ("ray::RunnerActor", 6.0),
    "a device's process": ("actors.devices.rpc_device", 3.0),
    "the node's actor": ("ray::NodeActor", 1.0),
    "a GPU's actor": ("ray::GpuActor", 1.0),
    "the scheduler": ("ray::SchedulerActor", 1.0),
    "the gateway": ("ray::GatewayActor", 0.5),
}
"""What a process is called, and how often it is struck."""
LONGEST_STOP_S = 8.0  # a node ends what has stood still for 5 s and is asked for something
BACK_S = 60.0  # in which a gateway that was struck has to answer again
GATEWAY = "the gateway"


class Mishaps:
    """Strikes processes below the Ray head. `struck`: how often, by mishap."""

    def __init__(self, chance: random.Random, url: str, ray_head: psutil.Process) -> None:
        self._chance, self._url, self._head = chance, url, ray_head
        self._gateway_back_at = 0.0  # on the monotonic clock; infinite while it is gone
        self.struck: Counter[str] = Counter()

    def rows(self) -> list[tuple[str, str]]:
        return [(mishap, str(count)) for mishap, count in sorted(self.struck.items())]

    def gateway_was_gone(self, since: float) -> bool:
        """Whether a request that began then may have met a gateway that was killed."""
        return since <= self._gateway_back_at

    async def strike_until(self, end: float, every_s: float) -> None:
        while time.monotonic() + LONGEST_STOP_S < end:
            await asyncio.sleep(min(self._chance.expovariate(1 / every_s), max(0.0, end - time.monotonic())))
            names, weights = list(TARGETS), [weight for _, weight in TARGETS.values()]
            await self._strike(self._chance.choices(names, weights)[0])

    async def _strike(self, name: str) -> None:
        stop, pause_s = self._chance.random() < 0.4, self._chance.uniform(0.5, LONGEST_STOP_S)
        luck = self._chance.random()
        found = self._processes(TARGETS[name][0])
        if not found:
            return
        process = found[int(luck * len(found))]
        self.struck[f"{name} is {'stopped' if stop else 'killed'}"] += 1
        print(
            f"{time.strftime('%H:%M:%S')} {name} (process {process.pid}) is {'stopped' if stop else 'killed'}",
            flush=True,
        )
        with contextlib.suppress(psutil.NoSuchProcess):
            if not stop:
                process.kill()
            else:
                process.suspend()
                await asyncio.sleep(pause_s)
                process.resume()
        if name == GATEWAY and not stop:
            await self._gateway_returns()

    def _processes(self, name: str) -> list[psutil.Process]:
        """By age, the youngest last."""
        found = []
        for process in self._head.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if name in " ".join(process.cmdline()):
                    found.append((process.create_time(), process.pid, process))
        return [process for *_, process in sorted(found, key=lambda each: each[:2])]

    async def _gateway_returns(self) -> None:
        self._gateway_back_at = float("inf")
        deadline = time.monotonic() + BACK_S
        async with httpx.AsyncClient(base_url=self._url, trust_env=False) as http:
            while time.monotonic() < deadline:
                with contextlib.suppress(httpx.TransportError):
                    if (await http.get("/api/v1/health")).status_code == httpx.codes.OK:
                        break
                await asyncio.sleep(0.2)
        self._gateway_back_at = time.monotonic()
