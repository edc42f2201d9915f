"""llama.cpp's load report, as its log lines spell it."""

from __future__ import annotations

from actors.serving.buffers import parse_buffers
from scheduler.costs.params import DeviceBytes, HostBytes

MIB = 1 << 20

LINES = """
load_tensors:   CPU_Mapped model buffer size =    10.00 MiB
load_tensors:   CPU_Mapped model buffer size =     2.50 MiB
load_tensors:        CUDA0 model buffer size =   100.00 MiB
load_tensors: RPC0[127.0.0.1:5001] model buffer size =    50.00 MiB
llama_context:  CUDA_Host  output buffer size =     0.50 MiB
llama_kv_cache:      CUDA0 KV buffer size =     8.00 MiB
llama_kv_cache:      CUDA0 KV buffer size =     4.00 MiB
llama_memory_recurrent: RPC0[127.0.0.1:5001] RS buffer size =     3.00 MiB
sched_reserve:      CUDA0 compute buffer size =    90.00 MiB
sched_reserve:      CUDA0 compute buffer size =    60.00 MiB
sched_reserve: RPC0[127.0.0.1:5001] compute buffer size =     6.00 MiB
sched_reserve:  CUDA_Host compute buffer size =     1.25 MiB
llama_context: compute buffer size is not a report
""".splitlines()


def test_sums_what_adds_up_and_takes_the_last_of_what_is_replaced() -> None:
    sizes = parse_buffers(LINES, ["CUDA0", "RPC0[127.0.0.1:5001]"], 4096)
    assert sizes.devices == (DeviceBytes(100 * MIB, 12 * MIB, 60 * MIB), DeviceBytes(50 * MIB, 3 * MIB, 6 * MIB))
    assert sizes.host == HostBytes(int(12.5 * MIB), 0, int(1.25 * MIB), MIB // 2)
    assert sizes.n_ctx_per_slot == 4096


def test_what_no_device_owns_is_the_hosts() -> None:
    sizes = parse_buffers(LINES, [], 1)
    assert sizes.devices == ()
    assert sizes.host == HostBytes(int(162.5 * MIB), 15 * MIB, int(67.25 * MIB), MIB // 2)
