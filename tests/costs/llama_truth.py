"""A program that asks the installed llama.cpp how many bytes it allocates, or would; run by `comparison`.

Reads a request (JSON) and prints one answer per case, as soon as it has it. It runs as a process of its own, because
llama.cpp ends the process on some inputs and cannot forget a device. RPC devices are loopback servers that this program
starts itself; they size tensors as host RAM does.

The sums per buffer type come from `llama_get_memory_breakdown`, which returns a std::map by value: libstdc++'s layout
of it is walked here (x86-64 and AArch64 Linux).
"""

from __future__ import annotations

import ctypes as c
import json
import os
import re
import socket
import subprocess
import sys
import time
from typing import Any

import llama_cpp

LIBRARY = llama_cpp.llama_cpp._lib
P, SIZE = c.c_void_p, c.c_size_t
SERVER = """
import ctypes as c, sys
c.CDLL(None).prctl(1, 9)  # ends with its parent, whatever ends that
import llama_cpp
lib = llama_cpp.llama_cpp._lib
llama_cpp.llama_backend_init()
by_type = lib["ggml_backend_dev_by_type"]; by_type.restype, by_type.argtypes = c.c_void_p, [c.c_int]
start = lib["ggml_backend_rpc_start_server"]
start.restype, start.argtypes = None, [c.c_char_p, c.c_char_p, c.c_size_t, c.c_size_t, c.POINTER(c.c_void_p)]
start(sys.argv[1].encode(), None, 1, 1, (c.c_void_p * 1)(by_type(0)))
"""


class Map(c.Structure):
    """The header of a libstdc++ std::map."""

    _fields_ = [("compare", c.c_uint64), ("colour", c.c_uint64), ("root", P), ("left", P), ("right", P), ("size", SIZE)]


class Node(c.Structure):
    _fields_ = [
        ("colour", c.c_uint64), ("parent", P), ("left", P), ("right", P),
        ("buffer_type", P), ("model", SIZE), ("context", SIZE), ("compute", SIZE),
    ]  # fmt: skip


def function(name: str, result: Any, *arguments: Any) -> Any:
    found = LIBRARY[name]
    found.restype, found.argtypes = result, list(arguments)
    return found


class Override(c.Structure):
    _fields_ = [("pattern", c.c_char_p), ("buffer_type", P)]


def breakdown(context: Any) -> dict[str, list[int]]:
    """[weights, cache, compute] bytes per device, all host buffer types together as "host"."""
    found: dict[str, list[int]] = {}
    head = function("_Z26llama_get_memory_breakdownPK13llama_context", Map, P)(context)
    stack = [head.root] if head.root else []
    while stack:
        node = Node.from_address(stack.pop())
        stack += [child for child in (node.left, node.right) if child]
        is_host = function("ggml_backend_buft_is_host", c.c_bool, P)(node.buffer_type)
        device = function("ggml_backend_buft_get_device", P, P)(node.buffer_type)
        name = "host" if is_host else function("ggml_backend_dev_name", c.c_char_p, P)(device).decode()
        sums = found.setdefault(name, [0, 0, 0])
        for index, size in enumerate((node.model, node.context, node.compute)):
            sums[index] += size
    return found


def attach(model: Any, context: Any, paths: list[str], log: list[str], endpoints: list[str]) -> dict[str, float]:
    """Attach adapters and decode a token, for that is when the graph is reserved anew; MiB of adapters per device."""
    if not paths:
        return {}
    started = len(log)
    adapters = [llama_cpp.llama_adapter_lora_init(model, path.encode()) for path in paths]
    if not all(adapters):
        return {"refused": 1.0}
    array = (llama_cpp.llama_adapter_lora_p_ctypes * len(adapters))(*adapters)
    llama_cpp.llama_set_adapters_lora(
        context, array, len(adapters), (c.c_float * len(adapters))(*[1.0] * len(adapters))
    )
    batch = llama_cpp.llama_batch_init(1, 0, 1)
    batch.n_tokens, batch.token[0], batch.pos[0], batch.n_seq_id[0], batch.seq_id[0][0] = 1, 1, 0, 1, 0
    batch.logits[0] = 1
    assert llama_cpp.llama_decode(context, batch) == 0
    llama_cpp.llama_batch_free(batch)
    found: dict[str, float] = {}
    for name, mib in re.findall(r"(\S+) LoRA buffer size = +([\d.]+) MiB", "".join(log[started:])):
        place = next((f"RPC{i}" for i, endpoint in enumerate(endpoints) if endpoint in name), "host")
        found[place] = found.get(place, 0.0) + float(mib)
    return found


def has(record: c.Structure, name: str) -> bool:
    return name in {field[0] for field in record._fields_}


def fill(record: c.Structure, **values: Any) -> None:
    """Set fields of a record of llama.cpp's. ctypes itself would take a name that this release does not have, and do
    nothing."""
    for name, value in values.items():
        if not has(record, name):
            raise SystemExit(f"{type(record).__name__} of this release has no {name}")
        setattr(record, name, value)


def answer(request: dict[str, Any], case: dict[str, Any], log: list[str], endpoints: list[str]) -> dict[str, Any]:
    params = llama_cpp.llama_model_default_params()
    fill(params, n_gpu_layers=case["n_gpu_layers"], no_alloc=not request["real"], use_extra_bufts=False)
    fill(params, **({"load_mode": 0} if has(params, "load_mode") else {"use_mmap": False}))
    if case.get("mtp"):
        fill(params, load_mtp=True)
    keep: list[Any] = []
    if case["tensor_split"]:
        shares = (c.c_float * llama_cpp.llama_max_devices())(*case["tensor_split"])
        params.tensor_split = shares
        keep.append(shares)
    if case["experts_pattern"]:
        cpu = function("ggml_backend_cpu_buffer_type", P)()
        overrides = (Override * 2)(Override(case["experts_pattern"].encode(), cpu), Override(None, None))
        params.tensor_buft_overrides = c.cast(overrides, P)
        keep.append(overrides)
    model = llama_cpp.llama_model_load_from_file(case["path"].encode(), params)
    if not model:
        return {"error": "".join(log[-8:])}
    asked = case["context"]
    wanted = llama_cpp.llama_context_default_params()
    same = (
        "n_ctx n_seq_max n_batch n_ubatch kv_unified swa_full embeddings type_k type_v n_outputs_max n_rs_seq".split()
    )
    fill(wanted, **{key: asked[key] for key in same}, flash_attn_type=int(asked["flash_attn"] == "on"))
    if case.get("mtp"):
        fill(wanted, ctx_type=1)
    target = target_context = None
    if case.get("target"):  # a draft reads the vocabulary, or the cache, of the model that it guesses for
        target = llama_cpp.llama_model_load_from_file(case["target"].encode(), params)
        target_context = llama_cpp.llama_init_from_model(target, wanted)
        fill(wanted, ctx_other=target_context)
    log.clear()
    context = llama_cpp.llama_init_from_model(model, wanted)
    if not context:
        return {"error": "".join(log[-8:])}
    lora = attach(model, context, case.get("adapters") or [], log, endpoints)
    output = re.search(r"output buffer size =\s+([\d.]+)", "".join(log))
    result = {
        "bytes": breakdown(context),
        "n_ctx": llama_cpp.llama_n_ctx(context),
        "output_mib": float(output[1]) if output else 0.0,
        "lora_mib": lora,
    }
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    if target:
        llama_cpp.llama_free(target_context)
        llama_cpp.llama_model_free(target)
    return result


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def connect(endpoint: str) -> None:
    """Register the device at `endpoint`, as soon as its server listens."""
    host, port = endpoint.split(":")
    for _ in range(200):
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            break
        except OSError:
            time.sleep(0.05)
    registry = function("ggml_backend_rpc_add_server", P, c.c_char_p)(endpoint.encode())
    function("ggml_backend_register", None, P)(registry)


def main() -> None:
    request = json.load(sys.stdin)
    log: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda level, text, _: log.append(text.decode("utf-8", "replace")))
    llama_cpp.llama_log_set(callback, None)
    llama_cpp.llama_backend_init()
    endpoints = [f"127.0.0.1:{free_port()}" for _ in range(request["devices"])]
    servers = [
        subprocess.Popen([sys.executable, "-c", SERVER, e], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for e in endpoints
    ]
    try:
        for endpoint in endpoints:
            connect(endpoint)
        for case in request["cases"]:
            print("ANSWER " + json.dumps(answer(request, case, log, endpoints)), flush=True)
    finally:
        for server in servers:
            server.kill()
            server.wait()
    os._exit(0)  # llama.cpp would wait for servers that are gone


if __name__ == "__main__":
    main()
