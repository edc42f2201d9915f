"""`arriero inspect` and `arriero footprint`: the contract that outside programs rely on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from gguf_shapes import SMALL, write_model
from test_adapters import adapter_file
from test_projectors import gemma3
from typer.testing import CliRunner

from actors.measurements import MeasurementStore, llama_build, measurements_path
from arriero.cli import files
from scheduler.costs.footprint import footprint
from scheduler.costs.measurements import Measurements, load_key
from scheduler.costs.params import ContextParams, DeviceSpec, Layout
from scheduler.costs.shape import read_shape
from scheduler.errors import Rejected

APP = typer.Typer()
APP.command()(files.inspect)
APP.command()(files.footprint)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(SMALL["qwen3moe"], tmp_path / "model.gguf", vocabulary=False)


def run(*words: object) -> str:
    result = CliRunner().invoke(APP, [str(word) for word in words])
    if isinstance(result.exception, Rejected):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def costs(model: Path, grid: Any, *options: Any) -> list[dict[str, Any]]:
    path = model.with_name("grid.json")
    path.write_text(json.dumps(grid), encoding="utf-8")
    answers: list[dict[str, Any]] = json.loads(run("footprint", model, "--grid", path, *options, "--json"))
    return answers


def test_inspect_prints_architecture_and_layers_with_their_bytes(model: Path) -> None:
    said = json.loads(run("inspect", model, "--json"))
    assert said["architecture"] == "qwen3moe" and said["compute_is_exact"]
    assert len(said["layers"]) == said["n_layer_all"] == 6
    everything = said["input_bytes"] + said["output_bytes"] + sum(layer["bytes"] for layer in said["layers"])
    assert everything == said["weights_bytes"]
    assert sum(layer["experts_bytes"] for layer in said["layers"]) == said["experts_bytes"] > 0


def test_the_contract_in_full(model: Path) -> None:
    case = {
        "devices": [{"name": "left", "kind": "cuda"}, {"name": "right", "kind": "rpc"}],
        "n_gpu_layers": -1, "tensor_split": [1, 3], "experts_on_host": False, "n_ctx": 1024, "n_seq_max": 2,
        "n_batch": 256, "n_ubatch": 128, "type_k": "q8_0", "type_v": "q8_0", "flash_attn": "on", "kv_unified": True,
        "swa_full": True,
    }  # fmt: skip
    [answer] = costs(model, [case])
    assert list(answer) == ["devices", "host", "host_ram", "sources", "measured"]
    assert answer["sources"] == {"weights": "rules", "kv": "rules", "compute": "graph", "output": "rules"}
    assert answer["measured"] is None
    assert list(answer["devices"]) == ["left", "right"]
    assert list(answer["devices"]["left"]) == ["weights_bytes", "kv_bytes", "compute_bytes"]
    assert list(answer["host"]) == ["weights_bytes", "kv_bytes", "compute_bytes", "output_bytes"]
    layout = Layout((DeviceSpec("left", "cuda"), DeviceSpec("right", "rpc")), -1, (1, 3))
    context = ContextParams(1024, 2, 256, 128, "q8_0", "q8_0", "on", True, True)
    expected = footprint(read_shape(model), layout, context, llama_build())
    assert answer["devices"]["right"]["weights_bytes"] == expected.devices[1].weights_bytes
    assert answer["devices"]["right"]["kv_bytes"] == expected.devices[1].kv_bytes
    assert answer["host"]["output_bytes"] == expected.host.output_bytes


def test_missing_keys_have_the_defaults(model: Path) -> None:
    devices = [{"name": "a", "kind": "cuda"}, {"name": "b", "kind": "cuda"}]
    short, long = costs(
        model, [{"devices": devices}, {"devices": devices, "n_gpu_layers": -1, "tensor_split": [1, 1], "n_ctx": 4096}]
    )
    assert short == long
    alone = costs(model, [{}])[0]
    assert alone["devices"] == {}
    assert alone["host"]["weights_bytes"] == read_shape(model).weights_bytes


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ([{"n_contx": 4096}], r"grid\[0\] has the unknown key 'n_contx'; did you mean 'n_ctx'"),
        ([{}, {"devices": [{"nam": "x"}]}], r"grid\[1\].devices\[0\] has the unknown key 'nam'; did you mean 'name'"),
        ([{"devices": [{"name": "a", "kind": "tpu"}]}], "cuda"),
        ([{"devices": [{"name": "a"}, {"name": "a"}]}], "different names"),
        ([{"devices": [{"name": "a"}], "tensor_split": [1, 1]}], r"grid\[0\]: tensor_split has 2 shares for 1 devices"),
        ([{"n_ctx": "many"}], "n_ctx must be a whole number"),
        ([{"n_ctx": True}], "n_ctx must be a whole number"),
        ([{"kv_unified": 1}], "kv_unified must be true or false"),
        ([{"type_v": "q8_0", "flash_attn": "off"}], r"grid\[0\]: a q8_0 V cache needs flash attention"),
        ({"n_ctx": 1}, "must hold a list"),
        ([3], "must be an object"),
    ],
)
def test_mistakes_in_the_grid_are_named(grid: object, words: str, model: Path) -> None:
    with pytest.raises(Rejected, match=words):
        costs(model, grid)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="No such file"):
        run("inspect", tmp_path / "nothing.gguf")


def test_for_people(model: Path, tmp_path: Path) -> None:
    assert "qwen3moe" in run("inspect", model)
    assert "gpu0" in run("footprint", model)
    assert "to the byte, compute buffers too" in " ".join(run("footprint", model).split())
    from dataclasses import replace

    strange = write_model(replace(SMALL["qwen3"], arch="qwen9"), tmp_path / "strange.gguf", vocabulary=False)
    assert "cautious upper bound" in " ".join(run("inspect", strange).split())
    assert "cautious upper bound" in " ".join(run("footprint", strange).split())


def test_neither_ray_nor_llama_cpp_is_imported(model: Path) -> None:
    program = f"""
import sys
from arriero.cli import files
files.footprint({str(model)!r}, json=True)
files.inspect({str(model)!r}, False)
print(sorted({{"ray", "llama_cpp", "numpy", "pydantic"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_real_loads_took_is_shown_beside_the_prediction(model: Path) -> None:
    shape, context = read_shape(model), ContextParams()
    layout = Layout((DeviceSpec("d0", "cuda"),), -1, (1.0,))
    memory = Measurements()
    took = footprint(shape, layout, context, llama_build())
    memory.loaded(shape, layout, context, llama_build(), took)
    store = MeasurementStore(measurements_path())
    store.put(memory.loaded(shape, layout, context, llama_build(), took))
    held = memory.held(load_key(shape, layout, context, llama_build()), 0, 300 << 20)
    assert held is not None
    store.put(held)
    store.close()
    try:
        card, host = costs(model, [{"devices": [{"name": "my card", "kind": "cuda"}]}, {"n_gpu_layers": 0}])
        shown = run("footprint", str(model))
    finally:
        measurements_path().unlink()
    assert host["measured"] is None
    assert card["measured"]["loads"] == 2
    assert card["measured"]["devices"]["my card"] == card["devices"]["my card"]
    assert card["measured"]["outside_buffers_bytes"] == {"my card": 300 << 20}
    assert "measured 2 times" in shown


def test_a_damaged_database_is_no_matter_of_this_command(model: Path) -> None:
    measurements_path().parent.mkdir(parents=True, exist_ok=True)
    measurements_path().write_bytes(b"x" * 4096)
    try:
        assert costs(model, [{}])[0]["measured"] is None
    finally:
        measurements_path().unlink()


def test_host_ram_is_told_steady_and_at_its_peak(model: Path) -> None:
    [mapped, read] = costs(model, [{"n_gpu_layers": 0}, {"n_gpu_layers": 0, "use_mmap": False}])
    parts = mapped["host_ram"]["parts"]
    assert mapped["host_ram"]["mapped_bytes"] == mapped["host"]["weights_bytes"]
    assert mapped["host_ram"]["steady_bytes"] + mapped["host"]["weights_bytes"] == read["host_ram"]["steady_bytes"]
    assert mapped["host_ram"]["peak_bytes"] >= mapped["host_ram"]["steady_bytes"] > parts["process_bytes"]
    with pytest.raises(Rejected, match="use_mmap must be true or false"):
        costs(model, [{"use_mmap": 1}])


def test_what_comes_with_a_model_is_costed_with_it(tmp_path: Path) -> None:
    spec = SMALL["glm4moe-nextn"]
    model = write_model(spec, tmp_path / "model.gguf", vocabulary=False)
    draft = write_model(SMALL["llama"], tmp_path / "draft.gguf", vocabulary=False)
    lora = adapter_file(spec, 8, r"blk\.[0-5]\.attn_q\.weight").write(tmp_path / "style.gguf")
    mmproj = gemma3().write(tmp_path / "mmproj.gguf")
    [alone, _] = json.loads(run("footprint", model, "--json"))
    companions = ["--lora", lora, "--mmproj", mmproj, "--draft", draft, "--mtp"]
    [all_of_it, on_host] = json.loads(run("footprint", model, *companions, "--json"))
    assert list(all_of_it["beside"]) == ["mtp", "draft", "mmproj"]
    for name in ("draft", "mmproj"):
        assert all_of_it["beside"][name]["devices"]["gpu0"]["weights_bytes"] > 0
        assert on_host["beside"][name]["host"]["weights_bytes"] > 0
    assert all_of_it["beside"]["mtp"]["devices"]["gpu0"]["kv_bytes"] > 0
    device = all_of_it["devices"]["gpu0"]
    assert device["weights_bytes"] > alone["devices"]["gpu0"]["weights_bytes"]
    assert device["kv_bytes"] == alone["devices"]["gpu0"]["kv_bytes"]
    assert all_of_it["host_ram"]["steady_bytes"] > alone["host_ram"]["steady_bytes"]
    table = run("footprint", model, *companions)
    assert all(f"+ {name}" in table for name in ("mtp", "draft", "mmproj"))


def test_a_draft_is_mapped_and_has_a_vocabulary_of_its_own(model: Path) -> None:
    case = {"n_gpu_layers": 0, "n_outputs_max": 1}  # a draft has one row of logits for each slot
    [alone] = costs(model, [case])
    [both] = costs(model, [case], "--draft", model)
    ram = {key: both["host_ram"][key] - alone["host_ram"][key] for key in ("steady_bytes", "mapped_bytes")}
    parts = alone["host_ram"]["parts"]
    assert ram["mapped_bytes"] == alone["host"]["weights_bytes"]
    assert ram["steady_bytes"] == alone["host_ram"]["steady_bytes"] - parts["process_bytes"]


def test_companions_that_cannot_be_are_refused(model: Path) -> None:
    with pytest.raises(Rejected, match="leave out --lora and --mtp"):
        run("footprint", write_model(SMALL["glm4moe-nextn"], model.with_name("mtp.gguf")), "--mtp", "--verify")
    with pytest.raises(Rejected, match="no prediction layers"):
        run("footprint", model, "--mtp")
    with pytest.raises(Rejected, match="No such file"):
        run("footprint", model, "--mmproj", model.with_name("missing.gguf"))
