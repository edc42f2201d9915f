"""Calls to ggml itself, below llama.cpp: devices, types, and a structure that the bindings lack."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp

from actors.serving.protocol import LoadFailed, LoadSpec


class BufferOverride(ctypes.Structure):
    """llama_model_tensor_buft_override (llama.h), which the bindings lack."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]


def ggml_function(name: str, result: Any, *arguments: Any) -> Any:
    """A ggml function through libllama's own handle: loading libggml by name could give a second registry."""
    function = llama_cpp.llama_cpp._lib[name]
    function.restype, function.argtypes = result, list(arguments)
    return function


def find_devices(spec: LoadSpec, rpc_endpoints: Sequence[str]) -> tuple[list[int], list[str]]:
    """ggml devices in the order of the spec, and the name of each one's buffers."""
    endpoints = iter(rpc_endpoints)
    by_name = ggml_function("ggml_backend_dev_by_name", ctypes.c_void_p, ctypes.c_char_p)
    devices, names = [], []
    n_cuda = 0
    for wanted in spec.devices:
        if wanted.kind == "rpc":
            endpoint = next(endpoints, None)
            if endpoint is None:
                raise LoadFailed("failed", f"no device process was started for {wanted.device_id}")
            device, name = _rpc_device(endpoint), f"RPC0[{endpoint}]"
        else:
            name = f"CUDA{n_cuda}"  # CUDA_VISIBLE_DEVICES lists the spec's cards in the spec's order
            device = by_name(name.encode())
            n_cuda += 1
        if not device:
            raise LoadFailed("failed", f"llama.cpp does not see {wanted.device_id} ({name}); is it built for it?")
        devices.append(device)
        names.append(name)
    return devices, names


def _rpc_device(endpoint: str) -> int | None:
    if not llama_cpp.llama_supports_rpc():
        raise LoadFailed("failed", "this llama-cpp-python is built without RPC; rebuild it with -DGGML_RPC=ON")
    server = ggml_function("ggml_backend_rpc_add_server", ctypes.c_void_p, ctypes.c_char_p)(endpoint.encode())
    if not server:
        raise LoadFailed("failed", f"the device process at {endpoint} does not answer")
    device: int | None = ggml_function("ggml_backend_reg_dev_get", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
        server, 0
    )
    return device


def cache_type(name: str) -> int:
    number = getattr(llama_cpp, f"GGML_TYPE_{name.upper()}", None)
    if number is None:
        raise LoadFailed("failed", f"{name!r} is not a type for the KV cache")
    return int(number)
