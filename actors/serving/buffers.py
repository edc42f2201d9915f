"""Measured memory: turns llama.cpp's load report into `BufferSizes`.

llama.cpp says what it allocated in log lines such as
`load_tensors: RPC0[127.0.0.1:5123] model buffer size = 12.50 MiB`. Weights (those of adapters too), KV cache and
recurrent state are sums over several lines (one per file, cache kind or buffer type); a compute or output buffer that
is logged again replaces the earlier one. A buffer belongs to a device when its name is that device's ("CUDA0", or the
endpoint inside "RPC0[…]"); whatever no device owns ("CPU", "CPU_Mapped", "CPU_REPACK", "CUDA_Host") is host memory.
Unit: bytes, to the 0.01 MiB that the log prints.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from actors.serving.protocol import BufferSizes
from scheduler.costs.params import DeviceBytes, Footprint, HostBytes
from scheduler.units import MIB

_LINE = re.compile(r":\s+(\S+)\s+(?:DSV4 \S+ )?(model|LoRA|KV|RS|state|compute|output) buffer size = +([0-9.]+) MiB")
_SUMMED = {"model": "weights", "LoRA": "weights", "KV": "kv", "RS": "kv", "state": "kv"}


def parse_buffers(lines: Iterable[str], device_buffers: Sequence[str], n_ctx_per_slot: int) -> BufferSizes:
    """The sizes that `lines` report; `device_buffers` names each device's buffers, in the order of the load spec."""
    owner = {name: index for index, name in enumerate(device_buffers)}
    host = len(device_buffers)
    found: dict[tuple[int, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for line in lines:
        match = _LINE.search(line)
        if match is None:
            continue
        name, kind, size = match.group(1), match.group(2), round(float(match.group(3)) * MIB)
        place = owner.get(name, host)
        if kind in _SUMMED:
            found[place, _SUMMED[kind]][name] += size
        else:
            found[place, kind][name] = size

    def total(place: int, kind: str) -> int:
        return sum(found[place, kind].values())

    def buffers(place: int) -> tuple[int, int, int]:
        return total(place, "weights"), total(place, "kv"), total(place, "compute")

    output_bytes = sum(total(place, "output") for place in range(host + 1))  # in host RAM, whoever allocates it
    return BufferSizes(
        devices=tuple(DeviceBytes(*buffers(index)) for index in range(host)),
        host=HostBytes(*buffers(host), output_bytes),
        n_ctx_per_slot=n_ctx_per_slot,
    )


def footprint_of(sizes: BufferSizes) -> Footprint:
    return Footprint(sizes.devices, sizes.host)


def reserved_anew(known: BufferSizes, lines: Iterable[str], device_buffers: Sequence[str]) -> BufferSizes:
    """`known`, with the compute buffers that `lines` report."""
    found = parse_buffers(lines, device_buffers, known.n_ctx_per_slot)
    devices = (
        replace(device, compute_bytes=now.compute_bytes)
        for device, now in zip(known.devices, found.devices, strict=True)
    )
    host = replace(known.host, compute_bytes=found.host.compute_bytes)
    return replace(known, devices=tuple(devices), host=host)
