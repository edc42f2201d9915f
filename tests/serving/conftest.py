"""Load specs in one line, and small models written once per session."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_model import FakeModel

from actors.serving.batcher import Batcher
from actors.serving.protocol import GenerateRequest, LoadDevice, LoadSpec, Sampling, content_of
from arriero.sample_models import write_sample_model
from scheduler.costs.params import ContextParams

SIZES: dict[str, Any] = {"n_layer": 4, "n_embd": 128, "n_ff": 256, "n_head": 4, "n_head_kv": 2, "head_dim": 32}


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`sample(kind, **sizes)`: a small model of that architecture."""
    folder = tmp_path_factory.mktemp("models")

    def write(kind: Any, precision: Any = "f16", **sizes: int) -> Path:
        path = folder / f"{kind}-{precision}-{'-'.join(f'{name}{size}' for name, size in sizes.items())}.gguf"
        return path if path.exists() else write_sample_model(path, kind, precision=precision, **{**SIZES, **sizes})

    return write


@pytest.fixture(scope="session")
def spec() -> Callable[..., LoadSpec]:
    """`spec(path, devices=…, n_gpu_layers=…, <context parameters>)`."""

    def make(path: Path | str, **given: Any) -> LoadSpec:
        layout = {
            "devices": (),
            "n_gpu_layers": 0,
            "tensor_split": (),
            "experts_pattern": "",
            "n_threads": 2,
            "host_required_bytes": 0,
            "adapters": (),
        }
        layout |= {name: given.pop(name) for name in list(given) if name in layout or name.startswith("use_")}
        context = ContextParams(**{"n_ctx": 512, "n_batch": 512, "n_ubatch": 128, **given})
        return LoadSpec(model="sample", path=str(path), context=context, **layout)  # type: ignore[arg-type]

    return make


@pytest.fixture
def virtual_gpus(tmp_path: Path) -> tuple[LoadDevice, ...]:
    """Two virtual GPUs of 32 and 24 MiB, nothing reserved."""
    from actors.devices.virtual import create_virtual_gpus
    from scheduler.units import MIB, NodeId

    return tuple(
        LoadDevice(facts.device_id, "rpc", 0, facts.state_path, facts.total_bytes)
        for facts in create_virtual_gpus(NodeId("here"), (32 * MIB, 24 * MIB), tmp_path / "gpus")
    )


@pytest.fixture
def engine(spec: Callable[..., LoadSpec]) -> Iterator[Callable[..., Any]]:
    """`engine(path, …)`: a loaded engine, closed after the test. Arguments as for `spec`."""
    from actors.serving.engine import Engine

    with contextlib.ExitStack() as open_engines:

        def load(path: Path, **given: Any) -> Engine:
            return open_engines.enter_context(contextlib.closing(Engine(spec(path, **given))))

        yield load


@pytest.fixture(scope="session")
def ask() -> Callable[..., GenerateRequest]:
    """`ask("text")`: a greedy chat request of at most 30 tokens; every field and part of the content can be given."""

    def make(text: str = "Where is the salt?", **given: Any) -> GenerateRequest:
        content = {name: given.pop(name) for name in ("messages", "prompt", "json_schema") if name in given}
        if "prompt" not in content:
            content.setdefault("messages", [{"role": "user", "content": text}])
        sampling = given.pop("sampling", Sampling(temperature=0))
        given = {"lease_id": "r", "max_tokens": 30, "sampling": sampling, **given}
        return GenerateRequest(content=content_of(**content), **given)

    return make


@pytest.fixture(scope="session")
def baseline() -> Callable[..., str]:
    """What llama-cpp-python's own `Llama` answers on the CPU alone."""

    def answer(path: Path, request: GenerateRequest, flash_attn: bool = True, **given: Any) -> str:
        import llama_cpp

        given = {"n_ctx": 512, "n_threads": 2, "flash_attn": flash_attn, "swa_full": False, **given}
        with contextlib.closing(llama_cpp.Llama(str(path), verbose=False, **given)) as llama:
            choice = llama.create_chat_completion(
                messages=json.loads(request.content)["messages"],
                max_tokens=request.max_tokens,
                temperature=0.0,
            )
        return str(choice["choices"][0]["message"]["content"])

    return answer


@pytest.fixture
def running() -> Iterator[Any]:
    """`running(model)`: a batcher over it, closed after the test."""
    batchers: list[Batcher] = []

    def start(model: FakeModel) -> Batcher:
        batchers.append(Batcher(model))
        return batchers[-1]

    yield start
    for batcher in batchers:
        batcher.close()
