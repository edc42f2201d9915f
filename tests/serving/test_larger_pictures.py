"""Pictures with more tokens than the projector's warm-up image, and with fewer: what they take on a device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from picture_files import png_of
from projector_files import write_as_qwen2vl, write_qwen2vl
from test_pictures import N_UBATCH, ask, message, told

from actors.devices.virtual import create_virtual_gpus, read_virtual_gpu, start_device_process
from actors.serving.engine import Engine
from actors.serving.protocol import LoadDevice, LoadFailed
from scheduler.costs.projector import read_projector
from scheduler.errors import EngineFailed
from scheduler.units import MIB, NodeId

pytestmark = pytest.mark.llama

Files = tuple[Path, Path]


@pytest.fixture(scope="module")
def eyes(sample: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A model and its projector, which takes pictures of any size."""
    folder = tmp_path_factory.mktemp("eyes")
    model = write_as_qwen2vl(folder / "qwen2vl.gguf", sample("llama", "f32"))
    return model, write_qwen2vl(folder / "mmproj.gguf", 128)


@pytest.fixture
def on_device(spec: Any, tmp_path: Path) -> Iterator[Callable[..., tuple[Engine, int]]]:
    """`on_device(model, mmproj or None, …)`: an engine on a virtual GPU, and the bytes that are used there."""
    with contextlib.ExitStack() as held:

        def load(model: Path, mmproj: Path | None, **context: Any) -> tuple[Engine, int]:
            (gpu,) = create_virtual_gpus(NodeId("here"), (256 * MIB,), Path(mkdtemp(dir=tmp_path)))
            device = LoadDevice(gpu.device_id, "rpc", 0, gpu.state_path, gpu.total_bytes)
            loaded = spec(model, n_ctx=4096, n_ubatch=N_UBATCH, devices=(device,), n_gpu_layers=-1, **context)
            process = held.enter_context(contextlib.closing(start_device_process(gpu.state_path, gpu.total_bytes)))
            if mmproj is not None:
                loaded = replace(loaded, mmproj=str(mmproj), mmproj_on_device=True)
            engine = held.enter_context(contextlib.closing(Engine(loaded, [process.endpoint])))
            return engine, read_virtual_gpu(gpu).used_bytes

        yield load


@pytest.mark.parametrize("most", [50 * 50, 56 * 56])
def test_larger_pictures_take_what_is_booked_and_at_the_load(most: int, eyes: Files, on_device: Any) -> None:
    model, mmproj = eyes
    _, alone_bytes = on_device(model, None)
    _, usual_bytes = on_device(model, mmproj)
    engine, loaded_bytes = on_device(model, mmproj, image_max_tokens=most)
    projector = read_projector(mmproj).taking(most)
    booked = projector.on_device("rpc", flash_attn=True)
    assert usual_bytes < loaded_bytes <= alone_bytes + booked.total_bytes
    assert booked.compute_bytes <= 2.5 * (loaded_bytes - alone_bytes)  # a bound, but no wild one
    side = projector.encoders[0].side_pixels
    _, picture, _ = engine._model.eyes.picture(2 * side, side, bytes(3 * 2 * side * side))
    assert 46 * 46 < picture.n_tokens <= most
    long = png_of(2 * side, side, b"\0" * ((1 + 6 * side) * side))
    assert told(engine, ask(message("x", long, "y"), max_tokens=2))[1].completion_tokens == 2


def test_small_pictures_are_made_larger(eyes: Files, spec: Any) -> None:
    model, mmproj = eyes
    loaded = spec(model, n_ctx=1024, image_min_tokens=100, image_max_tokens=400)
    with contextlib.closing(Engine(replace(loaded, mmproj=str(mmproj)))) as engine:
        for side in (28, 56, 2000):
            _, picture, _ = engine._model.eyes.picture(side, side, bytes(3 * side * side))
            assert 100 <= picture.n_tokens <= 400


def test_a_warm_up_that_fails_ends_the_load(eyes: Files, spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise EngineFailed("no room")

    monkeypatch.setattr("actors.serving.media.Projector.encode", refuse)
    model, mmproj = eyes
    with pytest.raises(LoadFailed, match="cannot encode a picture of 1400 x 1400 pixels: no room"):
        Engine(replace(spec(model, image_max_tokens=2500), mmproj=str(mmproj)))


def test_no_picture_needs_more_than_was_booked(eyes: Files, spec: Any) -> None:
    """The projector takes pictures of any size, and its buffers would grow with them."""
    model, mmproj = eyes
    side = 46 * 28 * 2  # twice the warm-up image's
    with contextlib.closing(Engine(replace(spec(model, n_ctx=1024), mmproj=str(mmproj)))) as engine:
        _, picture, _ = engine._model.eyes.picture(side, side, bytes(3 * side * side))
    (encoder,) = read_projector(mmproj).encoders
    assert picture.n_tokens <= encoder.most_tokens == 46 * 46


def test_a_file_that_is_no_projector_fails_the_load(sample: Any, spec: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    for path in (tmp_path / "bad.gguf", tmp_path / "missing.gguf", sample("llama")):
        with pytest.raises(LoadFailed, match="projector"):
            Engine(replace(spec(sample("llama")), mmproj=str(path)))
