"""llama.cpp's own sums of what a model and its context take, also for a load that allocates nothing.

`llama_get_memory_breakdown` is C++ and returns a std::map by value. The bindings lack it. So the
map is read here in libstdc++'s layout, as x86-64 and AArch64 Linux pass it; elsewhere there is no answer. The caller
must check the sums, because another release may have another struct.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import llama_cpp

from actors.serving.protocol import BufferSizes
from scheduler.costs.measurements import ROUNDING_BYTES
from scheduler.costs.params import DeviceBytes, Footprint, HostBytes

_SYMBOL = "_Z26llama_get_memory_breakdownPK13llama_context"


class _Map(ctypes.Structure):
    """The header of a std::map."""

    _fields_ = [
        ("compare", ctypes.c_uint64), ("colour", ctypes.c_uint64), ("root", ctypes.c_void_p),
        ("leftmost", ctypes.c_void_p), ("rightmost", ctypes.c_void_p), ("size", ctypes.c_size_t),
    ]  # fmt: skip


class _Node(ctypes.Structure):
    """A node of `std::map<ggml_backend_buffer_type_t, llama_memory_breakdown_data>`."""

    _fields_ = [
        ("colour", ctypes.c_uint64), ("parent", ctypes.c_void_p), ("left", ctypes.c_void_p),
        ("right", ctypes.c_void_p), ("buffer_type", ctypes.c_void_p), ("model", ctypes.c_size_t),
        ("context", ctypes.c_size_t), ("compute", ctypes.c_size_t),
    ]  # fmt: skip


def memory_breakdown(context: Any, devices: Sequence[int], output_bytes: int) -> Footprint | None:
    """Bytes per device (ggml's pointers, in this order) and on the host; None where llama.cpp cannot be asked.

    The logits buffer is not part of llama.cpp's sums: `output_bytes` is passed through.
    """
    library = llama_cpp.llama_cpp._lib
    if sys.platform != "linux" or not hasattr(library, _SYMBOL):
        return None
    ask = library[_SYMBOL]
    ask.restype, ask.argtypes = _Map, [ctypes.c_void_p]
    is_host = library["ggml_backend_buft_is_host"]
    is_host.restype, is_host.argtypes = ctypes.c_bool, [ctypes.c_void_p]
    device_of = library["ggml_backend_buft_get_device"]
    device_of.restype, device_of.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    sums = [[0, 0, 0] for _ in range(len(devices) + 1)]
    stack = [ask(context).root]
    while stack:
        address = stack.pop()
        if not address:
            continue
        node = _Node.from_address(address)
        stack += [node.left, node.right]
        device = None if is_host(node.buffer_type) else device_of(node.buffer_type)
        place = devices.index(device) if device in devices else len(devices)
        for index, size in enumerate((node.model, node.context, node.compute)):
            sums[place][index] += size
    shares = [DeviceBytes(weights, cache, compute) for weights, cache, compute in sums]
    host = shares.pop()
    return Footprint(tuple(shares), HostBytes(host.weights_bytes, host.kv_bytes, host.compute_bytes, output_bytes))


def checked_breakdown(context: Any, devices: Sequence[int], logged: BufferSizes) -> Footprint | None:
    """The same, to the byte; None also where it is not what the context's log says."""
    sums = memory_breakdown(context, devices, logged.host.output_bytes)
    if sums is None:
        return None
    told = [device.compute_bytes for device in logged.devices] + [logged.host.compute_bytes]
    summed = [device.compute_bytes for device in sums.devices] + [sums.host.compute_bytes]
    agree = all(abs(a - b) <= ROUNDING_BYTES for a, b in zip(told, summed, strict=True))
    return sums if agree else None


def without_weights(sums: Footprint) -> Footprint:
    """Of a second context of a model, whose weights are the first one's."""
    return Footprint(
        tuple(replace(device, weights_bytes=0) for device in sums.devices), replace(sums.host, weights_bytes=0)
    )
