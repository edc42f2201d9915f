"""A running service under load while its processes are killed and stopped.

    python -m benchmarks.faults [MINUTES] [--seed N] [--clients N] [--every SECONDS]

A Ray of its own, two virtual GPUs, and more sample models than they hold. `Clients` of a dozen kinds ask one request
after the other; `Mishaps` strike one process at a time. Then all is left in peace, and the `Referee` looks whether
everything came to rest. Who does what, and when, comes from the seed; what it meets there, from the machine.

It fails if a request had no end, or one that it should not have had; if a slot, a place in the queue or memory is held
for nobody; and if what is booked is less than what devices show. Prints a table of requests and one of mishaps.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

import psutil

from arriero.machine import end_ray, start_ray
from arriero.sample_models import SAMPLES, write_samples
from benchmarks.faults.clients import KINDS, Clients
from benchmarks.faults.mishaps import Mishaps
from benchmarks.faults.referee import Referee
from benchmarks.table import print_table
from scheduler.config import Catalogue, ModelParams, Policy
from scheduler.server import Server
from scheduler.units import MIB

VIRTUAL_GPUS = (96 * MIB, 64 * MIB)
CALM_S = 10.0
"""Before the load, and after the last mishap: whatever restarts has time to."""


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.splitlines()[0])
    arguments.add_argument("minutes", nargs="?", type=float, default=30.0)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--clients", type=int, default=len(KINDS), help="how many ask at the same time")
    arguments.add_argument("--every", type=float, default=15.0, help="mean seconds from one mishap to the next")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_samples(Path(folder))
        state = start_ray()
        try:
            from actors.bootstrap import bring_up, take_down

            url = bring_up(_catalogue(folder)).url
            clients, mishaps, referee = asyncio.run(_perform(url, psutil.Process(state.ray_pid), given))
            take_down()
        finally:
            end_ray(state)
    print_table(f"Requests, seed {given.seed}, {given.minutes:g} minutes", ("kind", "end", "requests"), clients.rows())
    print_table("Mishaps", ("mishap", "times"), mishaps.rows())
    for violation in (*clients.violations, *referee.violations):
        print("VIOLATION:", violation)
    print(f"\n{len(clients.violations) + len(referee.violations)} violations")
    sys.exit(bool(clients.violations or referee.violations))


async def _perform(url: str, ray_head: psutil.Process, given: argparse.Namespace) -> tuple[Clients, Mishaps, Referee]:
    mishaps = Mishaps(random.Random(f"mishaps {given.seed}"), url, ray_head)
    referee = Referee(url)
    async with Clients(url, given.seed, tuple(SAMPLES), mishaps) as clients:
        await asyncio.sleep(CALM_S)
        end = time.monotonic() + 60 * given.minutes
        asking = asyncio.gather(*(clients.ask_until(end, number) for number in range(given.clients)))
        await mishaps.strike_until(end - CALM_S, given.every)
        await asking
        await referee.come_to_rest()
        await clients.all_models_answer()
        await referee.unload(tuple(SAMPLES))
    return clients, mishaps, referee


def _catalogue(folder: str) -> Catalogue:
    return Catalogue(
        model_paths=(folder,),
        defaults=ModelParams(n_ctx=1024, n_ubatch=128, n_seq_max=2),
        policy=Policy(min_residency_s=0.0, queue_limit=64),
        server=Server(port=0),
        virtual_gpus=VIRTUAL_GPUS,
    )


if __name__ == "__main__":
    main()
