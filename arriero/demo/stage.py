"""The demo's models, devices and questions."""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

from arriero import sample_language, sample_models
from arriero.api import Status
from arriero.sample_models import SAMPLES, write_samples
from scheduler.config import Catalogue, ModelParams, Policy
from scheduler.errors import Rejected
from scheduler.server import Server
from scheduler.units import MIB, format_bytes

VIRTUAL_GPUS = (96 * MIB, 64 * MIB)
CONTEXT = ModelParams(n_ctx=1024, n_ubatch=128)
IN_TURN = (
    # The first three fill both GPUs. Each of the next three needs the memory of the least recently used model.
    "lana-gemma3",
    "quipu-granite",
    "sabio-deepseek2",
    "tropa-qwen3moe",
    "lana-gemma3",
    "quipu-granite",
    # Too large for one GPU; too large for both; experts too large for both.
    "yunta-llama",
    "recua-llama",
    "caravana-qwen3moe",
)
ON_THE_ROAD = "What do you carry over the pass today?"


@dataclass(slots=True)
class Stage:
    """Questions are (model, prompt). Empty `virtual_gpus`: the machine's own GPUs are used."""

    folder: Path
    virtual_gpus: tuple[int, ...]
    in_turn: tuple[tuple[str, str], ...]
    at_once: tuple[tuple[str, str], ...]
    samples: bool
    context: ModelParams = field(default_factory=ModelParams)
    _writing: threading.Thread | None = None
    _failed: list[BaseException] = field(default_factory=list)

    def write_samples(self) -> None:
        """Start to write the sample models in the background."""
        self._writing = threading.Thread(target=self._write, daemon=True)
        self._writing.start()

    def _write(self) -> None:
        try:
            write_samples(self.folder)
        except BaseException as error:  # raised again by wait(), in the thread that can end the demo
            self._failed.append(error)

    def wait(self) -> None:
        if self._writing is not None:
            self._writing.join()
        if self._failed:
            raise self._failed[0]

    def path(self, model: str) -> Path:
        return self.folder / f"{model}.gguf"

    def catalogue(self) -> Catalogue:
        return Catalogue(
            model_paths=(str(self.folder),),
            defaults=self.context,
            policy=Policy(min_residency_s=0.0),
            server=Server(port=0),
            virtual_gpus=self.virtual_gpus,
        )

    def introduction(self, status: Status) -> str:
        sizes = sum(path.stat().st_size for path in self.folder.glob("*.gguf"))
        gpus = ", ".join(f"{gpu.label} ({gpu.product})" for gpu in status.gpus) or "no GPU"
        models = len({model for model, _ in (*self.in_turn, *self.at_once)})
        return f"{models} models, {format_bytes(sizes)} in total; {gpus}."


def choose_stage(models: Path | None) -> Stage:
    """The user's own files or the samples, on the machine's GPUs or, without any, on virtual ones."""
    from actors.devices.nvml import list_gpus
    from scheduler.units import NodeId

    has_gpu = bool(list_gpus(NodeId("")))
    if models is not None:
        return _own(models.expanduser().absolute(), has_gpu)
    stage = Stage(
        folder=_samples_folder(),
        virtual_gpus=() if has_gpu else VIRTUAL_GPUS,
        in_turn=tuple((model, f"{ON_THE_ROAD} (stop {i + 1})") for i, model in enumerate(IN_TURN)),
        at_once=tuple((model, f"{who}, sing me something.") for who in ("Cria", "Lana") for model in SAMPLES),
        samples=True,
        context=CONTEXT,
    )
    stage.write_samples()
    return stage


def _samples_folder() -> Path:
    """Where samples are kept between demos. Each version of the code that writes them has its own folder."""
    recipe = b"".join(Path(str(module.__file__)).read_bytes() for module in (sample_models, sample_language))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "arriero" / f"samples-{hashlib.sha256(recipe).hexdigest()[:8]}"


def _own(folder: Path, has_gpu: bool) -> Stage:
    from scheduler.costs.shape import read_shape

    names = sorted(path.stem for path in folder.glob("*.gguf"))
    if not names:
        raise Rejected(f"{folder} holds no .gguf files")
    largest = max(read_shape(folder / f"{name}.gguf").weights_bytes for name in names)
    questions = tuple((name, "Tell me about mountain llamas in one sentence.") for name in names)
    return Stage(
        folder=folder,
        virtual_gpus=() if has_gpu else (largest + largest // 2, largest),
        in_turn=questions,
        at_once=questions,
        samples=False,
        context=ModelParams(n_ctx=2048),
    )
