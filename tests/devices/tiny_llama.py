"""A GGUF file just big enough for llama.cpp, and the programs that the tests run beside themselves.

llama.cpp cannot unregister a device, so everything that connects to a virtual GPU is a process of its own.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

N_VOCAB, N_EMBD, N_LAYER, N_FF = 512, 64, 2, 1024

CLIENT = """
import ctypes as c, json, sys
import llama_cpp

path, n_ctx, *endpoints = sys.argv[1:]
lib = llama_cpp.llama_cpp._lib

def function(name, result, *arguments):
    found = lib[name]
    found.restype, found.argtypes = result, arguments
    return found

log = []
keep = llama_cpp.llama_log_callback(lambda level, text, _: log.append(text.decode()))
llama_cpp.llama_log_set(keep, None)
llama_cpp.llama_backend_init()
devices = []
for endpoint in endpoints:
    registry = function("ggml_backend_rpc_add_server", c.c_void_p, c.c_char_p)(endpoint.encode())
    function("ggml_backend_register", None, c.c_void_p)(registry)
    devices.append(function("ggml_backend_reg_dev_get", c.c_void_p, c.c_void_p, c.c_size_t)(registry, 0))

def free_memory():
    free, total = c.c_size_t(), c.c_size_t()
    ask = function("ggml_backend_dev_memory", None, c.c_void_p, c.POINTER(c.c_size_t), c.POINTER(c.c_size_t))
    ask(devices[0], c.byref(free), c.byref(total))
    return [free.value, total.value]

def say(**facts):
    print(json.dumps({**facts, "memory": free_memory()}), flush=True)

say(step="connected")
for line in sys.stdin:
    if line.strip() == "memory":
        say(step="memory")
    elif line.strip() == "load":
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = -1
        model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        context_params = llama_cpp.llama_context_default_params()
        context_params.n_ctx = int(n_ctx)
        context = llama_cpp.llama_init_from_model(model, context_params) if model else None
        failed = "".join(text for text in log if "failed to allocate" in text)
        say(step="load", loaded=bool(model and context), failed=failed)
    elif line.strip() == "decode":
        tokens = (llama_cpp.llama_token * 3)(1, 2, 3)
        say(step="decode", status=llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, 3)))
"""

RUNNER = """
import sys
from actors.devices.virtual import start_device_process

state_path, capacity_bytes = sys.argv[1], int(sys.argv[2])
device = start_device_process(state_path, capacity_bytes)
print(device.endpoint, device.pid, flush=True)
sys.stdin.read()
"""


def write_tiny_llama(path: Path) -> int:
    """Write a llama without a vocabulary, F16, random weights; returns the bytes of its matrices on devices."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(N_VOCAB)
    writer.add_context_length(4096)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(N_EMBD // 2)
    writer.add_tokenizer_model("no_vocab")
    random = np.random.default_rng(7)

    def matrix(name: str, rows: int, columns: int) -> int:
        values = (random.standard_normal((rows, columns)) * 0.05).astype(np.float16)
        writer.add_tensor(name, values)
        return int(values.nbytes)

    matrix("token_embd.weight", N_VOCAB, N_EMBD)
    on_devices = matrix("output.weight", N_VOCAB, N_EMBD)
    writer.add_tensor("output_norm.weight", np.ones(N_EMBD, np.float32))
    for layer in range(N_LAYER):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(N_EMBD, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            on_devices += matrix(f"blk.{layer}.{name}.weight", N_EMBD, N_EMBD)
        for name in ("ffn_gate", "ffn_up"):
            on_devices += matrix(f"blk.{layer}.{name}.weight", N_FF, N_EMBD)
        on_devices += matrix(f"blk.{layer}.ffn_down.weight", N_EMBD, N_FF)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return on_devices
