"""LoRA adapters on real models: what they change, who shares a batch and a cache, and what they take."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from patience import wait_until

from actors.devices.byte_count import ByteCount
from actors.devices.virtual import start_device_process
from actors.measurements import llama_build
from actors.serving.engine import Engine
from actors.serving.protocol import GenerateRequest, LoadAdapter, LoadDevice, LoadFailed, content_of
from arriero.sample_adapters import write_sample_adapter
from scheduler.costs.adapter import adapted, read_adapter
from scheduler.costs.footprint import footprint
from scheduler.costs.measurements import ROUNDING_BYTES
from scheduler.costs.params import DeviceSpec, Layout
from scheduler.costs.shape import read_shape
from scheduler.entry_parts import MOST_SCALE
from scheduler.errors import Rejected

pytestmark = pytest.mark.llama

EXACT = {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}  # rounding of a millionth: no tie is that close
QUESTION = "Who carries the salt over the pass?"
FUN, TERSE = ((0, 1.0),), ((1, 0.7),)


@pytest.fixture
def model(sample: Any) -> Path:
    path: Path = sample("llama", "f32")
    return path


@pytest.fixture
def files(model: Path) -> tuple[LoadAdapter, ...]:
    """Two adapters, of unlike rank; neither applies by itself."""
    return tuple(
        LoadAdapter(name, str(write_sample_adapter(model.with_name(f"{name}.lora"), model, rank=rank, seed=rank)), 0.0)
        for name, rank in (("fun", 4), ("terse", 8))
    )


@pytest.fixture
def text(ask: Callable[..., GenerateRequest]) -> Callable[..., str]:
    def say(engine: Engine, lora: Any = None, **given: Any) -> str:
        return "".join(chunk.text for chunk in engine.generate(ask(QUESTION, lora=lora, **given)))

    return say


def test_an_adapter_changes_the_answer_and_scale_0_does_not(
    model: Path, files: tuple[LoadAdapter, ...], engine: Any, text: Any
) -> None:
    plain = text(engine(model, **EXACT))
    both = engine(model, adapters=files, **EXACT)
    fun = text(both, FUN)
    assert len({plain, fun, text(both, TERSE), text(both, FUN + TERSE), text(both, ((0, -1.0),))}) == 5
    assert plain == text(both) == text(both, ()) == text(both, ((0, 0.0), (1, 0.0))) == text(both, (("fun", 0.0),))
    assert fun == text(both, (("fun", 1.0),)) == text(both, ((0, 3.0), (0, 1.0)))
    alone = engine(model, adapters=(files[0]._replace(scale=1.0),), **EXACT)
    assert fun == text(alone) != text(alone, ((0, 0.5),))
    assert plain == text(alone, ((0, 0.0),))


def test_who_names_an_adapter_switches_the_others_off(
    model: Path, files: tuple[LoadAdapter, ...], engine: Any, text: Any
) -> None:
    on = engine(model, adapters=[each._replace(scale=1.0) for each in files], **EXACT)
    assert text(on) == text(on, ((0, 1.0), (1, 1.0))) != text(on, FUN)


@pytest.mark.parametrize("kv_unified", [False, True])
def test_different_sets_at_once_give_the_text_of_each_alone(
    kv_unified: bool, model: Path, files: tuple[LoadAdapter, ...], engine: Any, text: Any
) -> None:
    shared = engine(model, adapters=files, n_ctx=1024, n_seq_max=3, kv_unified=kv_unified, **EXACT)
    sets = [FUN, None, TERSE, FUN, ((0, 0.5), (1, 0.5))]
    alone = [text(engine(model, adapters=files, **EXACT), lora) for lora in sets]
    answers: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i: answers.update({i: text(shared, sets[i], lease_id=str(i))}))
        for i in range(len(sets))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[i] for i in range(len(sets))] == alone


@pytest.mark.parametrize("kind", ["llama", "gemma3", "granitehybrid"])
def test_what_is_remembered_is_not_shared_across_sets(kind: str, sample: Any, engine: Any, ask: Any) -> None:
    path = sample(kind, "f32")
    adapter = LoadAdapter("fun", str(write_sample_adapter(path.with_name(f"{kind}.lora"), path)), 0.0)
    loaded = engine(path, adapters=(adapter,), n_ctx=1024, n_seq_max=2, kv_unified=kind == "llama", **EXACT)

    def cached(lora: Any) -> int:
        *_, last = loaded.generate(ask(QUESTION * 12, lora=lora, max_tokens=2))
        return int(last.cached_tokens)

    assert cached(None) == 0
    assert cached(FUN) == 0
    assert cached(((0, 0.5),)) == 0  # takes a slot from one of them
    assert cached(((0, 0.5),)) > 32
    assert cached(((0, 0.25),)) == 0


@pytest.mark.parametrize("asked", [((2, 1.0),), ((-1, 1.0),), (("sad", 1.0),)])
def test_an_adapter_that_is_not_there_is_refused(
    asked: Any, model: Path, files: tuple[LoadAdapter, ...], engine: Any, text: Any
) -> None:
    with pytest.raises(Rejected, match=r"has no adapter .*; it has 0 \(fun\), 1 \(terse\)"):
        text(engine(model, adapters=files), asked)


def test_a_model_without_adapters_says_so(model: Path, engine: Any, text: Any) -> None:
    with pytest.raises(Rejected, match="name them under adapters in the catalogue"):
        text(engine(model), FUN)


def test_the_largest_scale_harms_nobody_else(
    model: Path, files: tuple[LoadAdapter, ...], engine: Any, text: Any
) -> None:
    """Numbers that overflow would stay in the cache, where masked cells are multiplied by 0: NaN, for everybody."""
    loaded = engine(model, adapters=files, **EXACT)
    plain = text(loaded)
    for scale in (MOST_SCALE, -MOST_SCALE):
        text(loaded, ((0, scale), (1, scale)))
    assert text(loaded) == plain


def test_a_file_that_is_no_adapter_fails_the_load_with_llama_cpp_s_words(model: Path, spec: Any) -> None:
    with pytest.raises(LoadFailed, match=r"could not load the adapter fun.*failed to apply lora adapter"):
        Engine(spec(model, adapters=(LoadAdapter("fun", str(model), 1.0),)))


@pytest.mark.parametrize("n_devices", [0, 1, 2])
def test_adapters_take_what_is_predicted_and_are_freed(
    n_devices: int,
    model: Path,
    files: tuple[LoadAdapter, ...],
    spec: Any,
    text: Any,
    virtual_gpus: tuple[LoadDevice, ...],
) -> None:
    """To what llama.cpp's log prints; the adapters have the same rank here, so that the graph is drawn exactly."""
    other = write_sample_adapter(model.with_name("other.lora"), model, rank=4, seed=9)
    adapters = (files[0], LoadAdapter("other", str(other), 0.0))
    devices, layers = virtual_gpus[:n_devices], {0: (), 1: (4.0,), 2: (2.0, 3.0)}[n_devices]
    loaded = spec(
        model,
        adapters=adapters,
        devices=devices,
        n_gpu_layers=int(sum(layers)),
        tensor_split=layers,
        n_seq_max=2,
        n_outputs_max=2,
        use_mmap=False,
    )
    layout = Layout(tuple(DeviceSpec(each.device_id, "rpc") for each in devices), int(sum(layers)), layers)
    shape = adapted(read_shape(model), [read_adapter(each.path) for each in adapters])
    ours = footprint(shape, layout, loaded.context, llama_build())
    processes = [start_device_process(gpu.state_path, gpu.total_bytes) for gpu in devices]
    try:
        with closing(Engine(loaded, [process.endpoint for process in processes])) as engine:
            theirs = engine.buffers
            held = [_held(device) for device in devices]
            for place, told in zip((*ours.devices, ours.host), (*theirs.devices, theirs.host), strict=True):
                for part in ("weights_bytes", "kv_bytes", "compute_bytes"):
                    said, predicted = getattr(told, part), getattr(place, part)
                    assert said == pytest.approx(predicted, abs=ROUNDING_BYTES), part
            assert text(engine, FUN) != text(engine, ((1, 1.0),))
            for device, before in zip(devices, held, strict=True):
                assert 0 < _held(device) <= before  # other sets need no more than all of them
        wait_until(lambda: not any(map(_held, devices)))  # their processes notice that the engine has gone
    finally:
        for process in processes:
            process.close()


def _held(device: LoadDevice) -> int:
    return sum(holder.held_bytes for holder in ByteCount(device.state_path).holders())


def test_content_is_not_asked_for_a_wrong_adapter(model: Path, engine: Any) -> None:
    request = GenerateRequest(content_of(prompt=[10**9]), lora=((0, 1.0),))
    with pytest.raises(Rejected, match="adapter"):
        list(engine(model).generate(request))
