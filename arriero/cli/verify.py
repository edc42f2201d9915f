"""`arriero footprint --verify`: the llama.cpp of this machine is asked the same question, without loading anything.

Devices of kind "rpc" are started for the purpose; "cuda" means the cards of this machine, in its own order. The
question is about the model alone, without adapters or prediction layers.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

from actors.devices.byte_count import ByteCount
from actors.serving.preflight import PreflightUnavailable, ask_llama_cpp
from actors.serving.protocol import LoadDevice, LoadFailed, LoadSpec
from arriero.cli.bill import Bill
from arriero.cli.grid import Case
from scheduler.costs.params import Footprint
from scheduler.costs.weights import experts_pattern
from scheduler.units import TIB


def verified(file: Path, bill: Bill, case: Case) -> Bill:
    """`bill` with llama.cpp's answer, or with why there is none."""
    cards = itertools.count()
    with tempfile.TemporaryDirectory() as folder:
        devices = []
        for index, device in enumerate(case.layout.devices):
            state = ""
            if device.kind == "rpc":
                state = str(ByteCount.create(Path(folder) / f"device-{index}").path)
            name = str(next(cards)) if device.kind == "cuda" else f"device-{index}"
            devices.append(LoadDevice(name, device.kind, 0, state, TIB))
        spec = LoadSpec(
            model=file.name,
            path=str(file),
            devices=tuple(devices),
            n_gpu_layers=case.layout.n_gpu_layers,
            tensor_split=case.layout.tensor_split,
            experts_pattern=experts_pattern(case.layout),
            context=case.context,
            n_threads=1,
            host_required_bytes=0,
            use_extra_bufts=case.use_extra_bufts,
        )
        try:
            answer = ask_llama_cpp(spec)
        except (LoadFailed, PreflightUnavailable) as error:
            return replace(bill, unverified=str(error))
    return replace(bill, verified=Footprint(answer.devices, answer.host))
