"""Checks every claim of the demo against what happened, and prints the summary."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from arriero.api import Notice
from arriero.cli.printing import console, styled
from arriero.client import Client
from arriero.demo.questions import MAX_TOKENS, Asked
from arriero.demo.stage import Stage

MEMORY_BACK_TIMEOUT_S = 30.0
EVICTIONS = 3


@dataclass(frozen=True, slots=True)
class Claim:
    what: str
    holds: bool
    seen: str


def judge_placements(stage: Stage, events: Sequence[Notice]) -> list[Claim]:
    """At least one model on one GPU, one split over several, one partly in host RAM."""
    if not (stage.samples and stage.virtual_gpus):
        return []
    tiers: dict[str, set[str]] = {}
    for event in events:
        if event.kind == "placed" and event.model:
            tiers.setdefault(str(event.data["tier"]), set()).add(event.model)
    wanted = (
        ("a model on a single GPU", ("one GPU",)),
        ("a model split over both GPUs", ("several GPUs",)),
        ("a model partly in host RAM", ("some layers in host RAM", "experts in host RAM")),
    )
    claims = []
    for what, names in wanted:
        seen = sorted(set().union(*(tiers.get(name, set()) for name in names)))
        claims.append(Claim(what, bool(seen), ", ".join(seen) or "none"))
    return claims


def judge_eviction_order(stage: Stage, events: Sequence[Notice]) -> list[Claim]:
    """Each of the first evictions takes one model: the least recently used one."""
    if not (stage.samples and stage.virtual_gpus):
        return []
    used: list[str] = []  # least recently used first
    evicted: list[str] = []
    expected: list[str] = []
    for event in events:
        if event.kind == "placed" and event.model:
            used.append(event.model)
        elif event.kind == "replica_evicted" and event.model and len(evicted) < EVICTIONS:
            evicted.append(event.model)
            expected.append(used[0] if used else "nobody")
            used = [model for model in used if model != event.model]
    holds = len(evicted) == EVICTIONS and evicted == expected
    return [Claim(f"{EVICTIONS} evictions, least recently used first", holds, ", then ".join(evicted) or "none")]


def judge_memory(client: Client) -> list[Claim]:
    """After all models are unloaded, none of their memory is in use."""
    deadline = time.monotonic() + MEMORY_BACK_TIMEOUT_S
    while (status := client.status()).replicas and time.monotonic() < deadline:
        time.sleep(0.1)
    held = {gpu.label: gpu.total_bytes - gpu.free_bytes - gpu.foreign_bytes for gpu in status.gpus}
    seen = ", ".join(f"{label}: {count} bytes held" for label, count in held.items()) or "no GPU"
    return [Claim("all memory is free again", not status.replicas and not any(held.values()), seen)]


def judge(stage: Stage, asked: Sequence[Asked]) -> list[Claim]:
    """Every question was answered, and every answer is the one that llama.cpp gives on the CPU."""
    answered = sum(not question.error for question in asked)
    claims = [Claim("every question was answered", answered == len(asked), f"{answered} of {len(asked)}")]
    reference = {
        (model, prompt): text
        for model in sorted({question.model for question in asked})
        for prompt, text in _cpu_alone(stage, model, sorted({q.prompt for q in asked if q.model == model})).items()
    }
    equal = sum(question.text == reference[question.model, question.prompt] for question in asked)
    what = "every answer equals that of llama_cpp.Llama on the CPU"
    # A GPU rounds differently from a CPU, so greedy answers may differ. On real GPUs this is shown, but not claimed.
    return [*claims, Claim(what, equal == len(asked) or not stage.virtual_gpus, f"{equal} of {len(asked)}")]


def show(claims: Sequence[Claim], asked: Sequence[Asked], took_s: float) -> None:
    table = Table("claim", "observed", "", title="Claims")
    for claim in claims:
        table.add_row(claim.what, claim.seen, styled("[green]holds[/]" if claim.holds else "[red]DOES NOT HOLD[/]"))
    console.print(table)
    for question in asked:
        if question.error:
            console.print(styled("[red]{}[/]: {}", question.model, question.error), soft_wrap=True)
    console.print(f"{len(asked)} answers, {took_s:.0f} s in all.")


def _cpu_alone(stage: Stage, model: str, prompts: Sequence[str]) -> dict[str, str]:
    import llama_cpp

    llama = llama_cpp.Llama(
        model_path=str(stage.path(model)),
        n_ctx=stage.context.n_ctx or 0,
        n_gpu_layers=0,
        flash_attn=True,
        swa_full=False,
        n_threads=1,  # on a busy machine, spinning threads take many times as long
        n_threads_batch=1,
        verbose=False,
    )
    answers = {}
    for prompt in prompts:
        llama.reset()
        messages = [{"role": "user", "content": prompt}]
        done = llama.create_chat_completion(messages=messages, temperature=0.0, max_tokens=MAX_TOKENS)
        answers[prompt] = done["choices"][0]["message"]["content"]
    llama.close()
    return answers
