"""Which CUDA cards this process sees. Free of Ray and of llama_cpp."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from actors.serving.protocol import LoadDevice
from scheduler.errors import InvariantBroken


def show_only(devices: Sequence[LoadDevice]) -> None:
    """Limits this process to the CUDA cards among `devices`, in their order; none hides all cards.

    Works only before a model is loaded: the CUDA library reads the variable once, when llama.cpp first looks for
    devices (importing llama_cpp does not). Raises InvariantBroken once `native` is imported, which does all of that.
    """
    if "actors.serving.native" in sys.modules:
        raise InvariantBroken("llama.cpp may have looked for GPUs already: it is too late to choose them")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(device.device_id for device in devices if device.kind == "cuda")
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
