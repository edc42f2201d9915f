"""Which CUDA cards this process sees. Free of Ray and of llama_cpp, which must be imported later."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from actors.serving.protocol import LoadDevice
from scheduler.errors import InvariantBroken


def show_only(devices: Sequence[LoadDevice]) -> None:
    """Limits this process to the CUDA cards among `devices`, in their order; none hides all cards.

    Works only before llama_cpp is imported, because the CUDA library reads the variable once: later is InvariantBroken.
    """
    if "llama_cpp" in sys.modules:
        raise InvariantBroken("llama_cpp is imported already, so the choice of GPUs would come too late")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(device.device_id for device in devices if device.kind == "cuda")
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
