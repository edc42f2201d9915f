"""Two real models behind a gateway: one that tells a story, and one that always begins a tool call.

Answers come from llama.cpp over the road; only the scheduler is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from gateway_fakes import running
from granting import NODE, Granting

from actors.endpoint import Endpoint
from actors.gateway.app import make_app
from actors.leasing import Grant
from actors.records import LayoutShare, LoadResult, ModelInfo, ReplicaStatus, Status, UnloadResult
from actors.serving.engine import Engine
from actors.serving.listener import Listener
from actors.serving.protocol import LoadSpec
from arriero import sample_language, sample_models
from arriero.sample_models import write_sample_model
from scheduler.costs.params import ContextParams
from scheduler.errors import UnknownModel
from scheduler.events import RequestArrived

SAMPLE, CALLER = "sample", "caller"
_ID_OF_BYTE_0, _FIRST_LETTER = 3, 259  # in the vocabulary of sample models
N_CTX_SLOT = 1024
TEMPLATE = """{%- if tools %}<|im_start|>system
You may call tools: {% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call one with <tools>[{"name": ..., "arguments": ...}]</tools><|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{% if message.content %}{{ message.content }}{% endif %}{% if message.tool_calls %}\
{% set called = message.tool_calls[0].function %}<tools>[\
{"name": "{{ called.name }}", "arguments": {{ called.arguments | tojson }}}]</tools>{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% if enable_thinking is defined and not enable_thinking %}
</think>

{% endif %}{% endif %}"""
"""Tool calls as a list of one between tags, and a thought at the beginning of every answer, unless it is unwanted."""

CITY: dict[str, Any] = {
    "type": "object", "properties": {"city": {"enum": ["Lima", "Cusco"]}}, "required": ["city"],
    "additionalProperties": False,
}  # fmt: skip
CITIES = ("Lima", "Cusco")


class Served(Granting):
    """Knows the runners of several models. What is asked of the scheduler is in `orders`."""

    def __init__(self, endpoints: Mapping[str, Endpoint]) -> None:
        super().__init__(next(iter(endpoints.values())))
        self._endpoints = endpoints
        self.orders: list[tuple[Any, ...]] = []

    async def acquire(self, request: RequestArrived) -> Grant:
        if request.model not in self._endpoints:
            raise UnknownModel(f"no model {request.model!r} in the catalogue")
        self._endpoint = self._endpoints[request.model]
        return await super().acquire(request)

    async def models(self) -> list[ModelInfo]:
        return [
            ModelInfo(name=name, state="available", architecture="llama", n_ctx=N_CTX_SLOT, n_ctx_train=4096)
            for name in self._endpoints
        ]

    async def status(self) -> Status:
        layout = [LayoutShare(device="host", layers=3, bytes=99)]
        replicas = [
            ReplicaStatus(
                replica_id=name, model=name, state="ready", node="box", layout=layout, n_gpu_layers=0,
                n_ctx=N_CTX_SLOT, slots=2, active=0, n_threads=1, idle_s=1.5,
            )
            for name in self._endpoints
        ]  # fmt: skip
        return Status(
            version="0.1.0", uptime_s=3.0, mode="normal", nodes=[], gpus=[], replicas=replicas, queue=[],
            last_notice_seq=0,
        )  # fmt: skip

    async def load(self, request: RequestArrived) -> LoadResult:
        self.orders.append(("load", request.model))
        return LoadResult(model=request.model, replica_id=request.model, node="box", n_ctx=N_CTX_SLOT, load_s=0.25)

    async def unload(self, model: str, unless_wanted: bool = False) -> UnloadResult:
        self.orders.append(("unload", model))
        return UnloadResult(model=model, replicas=[model])

    async def keep_alive(self, model: str, keep_alive_s: float) -> None:
        self.orders.append(("keep_alive", model, keep_alive_s))


@contextmanager
def serving_models(folder: Path) -> Iterator[tuple[str, Served]]:
    """The URL of a gateway over both models, which are written into `folder`, and its backend."""
    with ExitStack() as opened:
        endpoints = {}
        for name in (SAMPLE, CALLER):
            path = folder / f"{name}.gguf"
            _write(path, calls=name == CALLER)
            engine = opened.enter_context(closing(Engine(_spec(name, path))))
            endpoints[name] = opened.enter_context(closing(Listener(engine, NODE, "127.0.0.1"))).endpoint
        backend = Served(endpoints)
        url, _ = opened.enter_context(running(make_app(backend)))
        yield url, backend


def _write(path: Path, *, calls: bool) -> None:
    """With `calls`, whatever sentence the model begins, it begins a call; how that goes on, its grammar says."""
    beginnings, *others = sample_language._COLUMNS
    if calls:
        beginnings = tuple("<tools>\n" + " " * number for number in range(len(beginnings)))
    with (
        patch.object(sample_language, "_COLUMNS", (beginnings, *others)),
        patch.object(sample_models, "embedding_and_output", _without_blanks),
    ):
        write_sample_model(path, "llama", n_layer=2, n_embd=128, n_ff=256, n_head=4, n_head_kv=2, head_dim=32)


def _without_blanks(rng: np.random.Generator, n_embd: int) -> tuple[Any, Any]:
    """Grammars allow many spaces and lines between all that a model says in JSON; this one likes all else better."""
    embedding, output = sample_language.embedding_and_output(rng, n_embd)
    output[[_ID_OF_BYTE_0 + ord(blank) for blank in "\t\n "]] = -embedding[:_FIRST_LETTER].mean(axis=0)
    output[_FIRST_LETTER] = output[_ID_OF_BYTE_0 + ord(" ")]  # SentencePiece's own space
    return embedding, output


def _spec(name: str, path: Path) -> LoadSpec:
    context = ContextParams(n_ctx=2 * N_CTX_SLOT, n_seq_max=2, n_batch=N_CTX_SLOT, n_ubatch=256, embeddings=True)
    return LoadSpec(
        name, str(path), devices=(), n_gpu_layers=0, tensor_split=(), experts_pattern="", context=context, n_threads=1,
        host_required_bytes=0, chat_template=TEMPLATE, matryoshka_dimensions=(16,),
    )  # fmt: skip
