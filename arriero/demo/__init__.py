"""`arriero demo`: the whole product on one machine, every claim checked.

Without a GPU it writes small models that really run, starts two unequal virtual GPUs with less memory than the models
need together, and asks first one after the other (so that the order of evictions can be predicted), then all at once.
At the end every greedy answer is compared with what `llama_cpp.Llama` says on the CPU alone. Exit status 0 only if all
is as claimed.
"""

from __future__ import annotations

import time
from pathlib import Path

from arriero.cli.printing import console
from arriero.demo.questions import Asked, ask_all_at_once, ask_in_turn
from arriero.demo.screen import Screen
from arriero.demo.stage import Stage, choose_stage
from arriero.demo.verdict import Claim, judge, show
from arriero.machine import end_ray, start_ray

__all__ = ["run_demo"]


def run_demo(models: Path | None) -> int:
    """Run it; returns the exit status. `models`: the user's own GGUF files instead of the samples."""
    began = time.monotonic()
    stage = choose_stage(models)
    with console.status("starting a Ray of its own, and writing the models where they are not there yet"):
        state = start_ray()
    try:
        claims, asked = _perform(stage)
    finally:
        import ray

        from actors.bootstrap import take_down

        take_down()
        ray.shutdown()
        end_ray(state)
    with console.status("asking llama_cpp.Llama the same on the CPU alone"):
        claims += judge(stage, asked)
    show(claims, asked, time.monotonic() - began)
    return 0 if all(claim.holds for claim in claims) else 1


def _perform(stage: Stage) -> tuple[list[Claim], list[Asked]]:
    from actors.bootstrap import bring_up
    from arriero.client import Client
    from arriero.demo.verdict import judge_eviction_order, judge_memory, judge_placements

    stage.wait()
    deployment = bring_up(stage.catalogue())
    with Client(deployment.url) as client, Screen(client) as screen:
        screen.say(stage.introduction(client.status()))
        asked = ask_in_turn(client, stage.in_turn, screen)
        in_turn = list(client.events(follow=False))
        screen.say("Now everybody at once.")
        asked += ask_all_at_once(client, stage.at_once, screen)
        events = list(client.events(follow=False))
        claims = judge_placements(stage, events) + judge_eviction_order(stage, in_turn)
        for model in sorted({question.model for question in asked}):
            client.unload(model)
        claims += judge_memory(client)
    return claims, asked
