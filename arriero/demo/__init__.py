"""`arriero demo`: all of Arriero on one machine, with every claim checked.

Without a GPU it writes small models that really run, and starts two virtual GPUs of different sizes. Together they have
less memory than the models need. The models are asked one after the other, so that the order of evictions can be
predicted, and then all at once. At the end every greedy answer is compared with the answer of `llama_cpp.Llama` on the
CPU. The exit status is 0 only if every claim holds.
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
    """Run the demo; returns the exit status. `models`: a folder of the user's own GGUF files instead of the samples."""
    began = time.monotonic()
    stage = choose_stage(models)
    with console.status("starting Ray, and writing the sample models if they are missing"):
        state = start_ray()
    try:
        claims, asked = _perform(stage)
    finally:
        import ray

        from actors.bootstrap import take_down

        take_down()
        ray.shutdown()
        end_ray(state)
    with console.status("asking llama_cpp.Llama the same questions on the CPU"):
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
        screen.say("Now all questions at the same time.")
        asked += ask_all_at_once(client, stage.at_once, screen)
        events = list(client.events(follow=False))
        claims = judge_placements(stage, events) + judge_eviction_order(stage, in_turn)
        for model in sorted({question.model for question in asked}):
            client.unload(model)
        claims += judge_memory(client)
    return claims, asked
