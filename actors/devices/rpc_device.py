"""The process behind one virtual GPU of one runner: `python -m actors.devices.rpc_device STATE CAPACITY OWNER THREADS`.

A llama.cpp RPC server on loopback whose CPU backend is made to look like a card: the backend's function tables (plain
writable structs) are patched in this process, so that it reports the capacity and what is left of it, and refuses a
buffer that the shared count has no room for. llama.cpp above sees a device that runs out of memory.

Protocol with the parent: one JSON line on standard output, {"endpoint": …} or {"error": …}. The end of standard input
means that the parent is gone, and ends this process at once. llama.cpp's errors go to standard error; its other output
is dropped. Only llama.cpp's library is loaded: importing its Python package would
cost half a second per device and a second copy of the backend registry.
"""

from __future__ import annotations

import ctypes as c
import importlib.util
import json
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.devices.byte_count import ByteCount

_CPU_DEVICE = 0  # GGML_BACKEND_DEVICE_TYPE_CPU
_LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_BACKEND_INTERFACE = 2  # GGML_BACKEND_API_VERSION, to which the tables below belong (ggml-backend-impl.h)
_PORT_TRIES = 20

_GetMemory = c.CFUNCTYPE(None, c.c_void_p, c.POINTER(c.c_size_t), c.POINTER(c.c_size_t))
_AllocBuffer = c.CFUNCTYPE(c.c_void_p, c.c_void_p, c.c_size_t)
_FreeBuffer = c.CFUNCTYPE(None, c.c_void_p)
_Log = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)


class _DeviceTable(c.Structure):
    """Head of `ggml_backend_device_i`."""

    _fields_ = (("get_name", c.c_void_p), ("get_description", c.c_void_p), ("get_memory", _GetMemory))


class _BufferTypeTable(c.Structure):
    """Head of `ggml_backend_buffer_type_i`."""

    _fields_ = (("get_name", c.c_void_p), ("alloc_buffer", _AllocBuffer))


class _BufferTable(c.Structure):
    """Head of `ggml_backend_buffer_i`."""

    _fields_ = (("free_buffer", _FreeBuffer),)


class RpcDevice:
    """This process's CPU backend, limited to what `count` has left of `capacity_bytes`."""

    def __init__(self, count: ByteCount, capacity_bytes: int, owner_pid: int) -> None:
        self._count, self._capacity_bytes, self._owner_pid = count, capacity_bytes, owner_pid
        self._lib = c.CDLL(str(_library_path()))
        self._function("llama_log_set", None, _Log, c.c_void_p)(_print_errors, None)
        self._function("llama_backend_init", None)()
        self._device = self._function("ggml_backend_dev_by_type", c.c_void_p, c.c_int)(_CPU_DEVICE)
        registry = self._function("ggml_backend_dev_backend_reg", c.c_void_p, c.c_void_p)(self._device)
        version = c.c_int.from_address(registry).value
        if version != _BACKEND_INTERFACE:
            raise RuntimeError(
                f"the installed llama.cpp has backend interface {version}, virtual GPUs need {_BACKEND_INTERFACE}: "
                "install the llama-cpp-python release that Arriero pins"
            )
        self._patch()

    def serve(self, port: int, threads: int) -> None:
        """Serve on loopback `port`; returns only when that fails."""
        devices = (c.c_void_p * 1)(self._device)
        start = self._function(
            "ggml_backend_rpc_start_server", None, c.c_char_p, c.c_char_p, c.c_size_t, c.c_size_t, c.POINTER(c.c_void_p)
        )
        start(f"127.0.0.1:{port}".encode(), None, threads, 1, devices)

    def _patch(self) -> None:
        buffer_type = self._function("ggml_backend_dev_buffer_type", c.c_void_p, c.c_void_p)(self._device)
        buffer_size = self._function("ggml_backend_buffer_get_size", c.c_size_t, c.c_void_p)
        device_table = _DeviceTable.from_address(self._device)
        type_table = _BufferTypeTable.from_address(buffer_type)
        plain_alloc = _address_as(_AllocBuffer, type_table.alloc_buffer)
        plain_free: dict[int, Any] = {}

        def get_memory(_device: int, free: Any, total: Any) -> None:
            total[0] = self._capacity_bytes
            free[0] = max(0, self._capacity_bytes - self._count.used_bytes())

        def alloc_buffer(kind: int, size: int) -> int | None:
            if not self._count.take(size, self._capacity_bytes, self._owner_pid):
                return None
            buffer: int | None = plain_alloc(kind, size)
            if buffer is None:
                self._count.give_back(size, self._owner_pid)
                return None
            table = _BufferTable.from_address(buffer)
            plain_free[buffer] = _address_as(_FreeBuffer, table.free_buffer)
            table.free_buffer = counted_free
            return buffer

        def free_buffer(buffer: int) -> None:
            size = buffer_size(buffer)
            plain_free.pop(buffer)(buffer)
            self._count.give_back(size, self._owner_pid)

        counted_free = _FreeBuffer(free_buffer)
        device_table.get_memory = _GetMemory(get_memory)
        type_table.alloc_buffer = _AllocBuffer(alloc_buffer)
        # C keeps only the addresses: the Python sides must live as long as this device.
        self._callbacks = (counted_free, device_table.get_memory, type_table.alloc_buffer, device_table, type_table)

    def _function(self, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        # By index, not attribute: a fresh function object each time, whose types nobody else can change.
        function = self._lib[name]
        function.restype, function.argtypes = result, arguments
        return function


@_Log
def _print_errors(level: int, text: bytes, _data: object) -> None:
    if level == _LOG_ERROR:
        sys.stderr.write(text.decode(errors="replace"))


def _address_as(prototype: Any, pointer: Any) -> Any:
    """A copy of a function pointer that does not change when the table entry it was read from is overwritten."""
    return prototype(c.cast(pointer, c.c_void_p).value)


def _library_path() -> Path:
    """llama-cpp-python's libllama, without importing the package."""
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    if folder is None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise RuntimeError("llama-cpp-python is not installed: virtual GPUs need it, built with GGML_RPC=ON")
        folder = str(Path(spec.origin).parent / "lib")
    for name in ("libllama.so", "libllama.dylib"):
        if (Path(folder) / name).exists():
            return Path(folder) / name
    raise RuntimeError(f"no libllama in {folder}")


def _start_serving(device: RpcDevice, threads: int) -> int:
    """Serve from a thread of its own; returns the port once this process listens on it."""
    for _ in range(_PORT_TRIES):
        # Bound but not listening, with SO_REUSEADDR as the server uses it: nobody is given the port meanwhile.
        with socket.socket() as reserved:
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved.bind(("127.0.0.1", 0))
            port: int = reserved.getsockname()[1]
            server = threading.Thread(target=device.serve, args=(port, threads), daemon=True)
            server.start()
            while server.is_alive():
                if _listening(port):
                    threading.Thread(target=_end_with, args=(server,), daemon=True).start()
                    return port
                time.sleep(0.001)
    raise RuntimeError(f"no loopback port could be opened in {_PORT_TRIES} tries")


def _end_with(server: threading.Thread) -> None:
    """End the process with its server: a device that does not serve must not look alive."""
    server.join()
    os._exit(1)


def _listening(port: int) -> bool:
    """Whether one of this process's own sockets listens on `port`."""
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208 - numbers, not paths
        try:
            descriptor = int(entry)
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as own:
                if own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and own.getsockname()[1] == port:
                    return True
        except OSError:  # closed since it was listed
            continue
    return False


def main() -> None:
    """Take the four arguments, become the device, end with the parent."""
    state_path, capacity_bytes, owner_pid, threads = sys.argv[1], *map(int, sys.argv[2:])
    # A terminal's Ctrl-C reaches the whole process group; when to end is for the runner to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answer = os.dup(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    try:
        count = ByteCount(state_path)
        count.take(0, capacity_bytes, owner_pid)
        port = _start_serving(RpcDevice(count, capacity_bytes, owner_pid), threads)
        message = {"endpoint": f"127.0.0.1:{port}"}
    except Exception as error:
        message = {"error": f"{type(error).__name__}: {error}"}
    os.write(answer, json.dumps(message).encode() + b"\n")
    os.close(answer)
    while "endpoint" in message and os.read(0, 1):
        pass
    # Not sys.exit: the server thread never returns, and the memory is wanted back now.
    os._exit(0 if "endpoint" in message else 1)


if __name__ == "__main__":
    main()
