"""A node reads the headers of what comes with a model: bounded, and with every fault as a value."""

from __future__ import annotations

import pickle
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_llama import N_EMBD, N_LAYER, write_tiny_llama

from actors.devices.node import NodeMonitor, NodeSettings
from scheduler.costs.shape import ModelShape
from scheduler.errors import InvalidGGUF, Rejected
from scheduler.units import NodeId


@pytest.fixture
def monitor() -> NodeMonitor:
    return NodeMonitor(NodeId("n1"), NodeSettings(), lambda reading: True, address="10.0.0.7")


@pytest.fixture
def model(tmp_path: Path) -> str:
    write_tiny_llama(tmp_path / "tiny.gguf")
    return str(tmp_path / "tiny.gguf")


def write_adapter(path: Path, arch: str = "llama", width: int = N_EMBD, *, alora: bool = False) -> str:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    if alora:
        writer.add_array("adapter.alora.invocation_tokens", [1, 2])
    for il in range(N_LAYER):
        writer.add_tensor(f"blk.{il}.attn_q.weight.lora_a", np.zeros((4, width), np.float32))
        writer.add_tensor(f"blk.{il}.attn_q.weight.lora_b", np.zeros((width, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_a_model_is_read_with_its_adapters(monitor: NodeMonitor, model: str, tmp_path: Path) -> None:
    fun, terse = (write_adapter(tmp_path / f"{name}.gguf") for name in ("fun", "terse"))
    plain, one, both = (monitor.read_shape(model, adapters) for adapters in ((), (fun,), (fun, terse)))
    assert isinstance(plain, ModelShape) and isinstance(one, ModelShape) and isinstance(both, ModelShape)
    added = N_LAYER * 2 * 4 * N_EMBD * 4
    assert (one.weights_bytes, both.weights_bytes) == (plain.weights_bytes + added, plain.weights_bytes + 2 * added)
    assert pickle.loads(pickle.dumps(both)).n_adapter_pairs == 2 * N_LAYER
    assert monitor.read_shape(model, (fun,)) is one
    write_adapter(tmp_path / "fun.gguf", width=2 * N_EMBD)
    assert isinstance(monitor.read_shape(model, (fun,)), InvalidGGUF)


def test_wrong_companions_are_faults_of_the_files(monitor: NodeMonitor, model: str, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile.gguf"
    hostile.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 64)
    cases = {
        write_adapter(tmp_path / "q.gguf", "qwen3"): "adapts qwen3 models, this one is llama",
        write_adapter(tmp_path / "w.gguf", width=2 * N_EMBD): "do not fit blk.0.attn_q.weight",
        write_adapter(tmp_path / "a.gguf", alora=True): "activated LoRA",
        model: "not a LoRA adapter",
        str(hostile): "hostile.gguf",
    }
    for path, words in cases.items():
        fault = pickle.loads(pickle.dumps(monitor.read_shape(model, (path,))))
        assert isinstance(fault, InvalidGGUF) and words in fault.message
    fault = monitor.read_shape(model, (), model)
    assert isinstance(fault, InvalidGGUF)
    assert "not a multimodal projector" in fault.message and "mmproj: none" in fault.message
    assert isinstance(monitor.read_shape(model), ModelShape)


def test_a_companion_that_cannot_be_read_may_come_back(monitor: NodeMonitor, model: str, tmp_path: Path) -> None:
    fault = monitor.read_shape(model, (str(tmp_path / "gone.gguf"),))
    assert isinstance(fault, Rejected) and not isinstance(fault, InvalidGGUF)
    assert "gone.gguf cannot be read" in fault.message
