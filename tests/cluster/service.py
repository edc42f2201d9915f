"""A real Arriero for the tests of this folder: a private Ray, models that really run, answers to compare with."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import gguf
import httpx
import numpy as np
import psutil
import ray

from actors.bootstrap import Deployment, bring_up, take_down
from arriero import Client
from arriero.api import ArrieroError, ReplicaStatus, Unavailable
from arriero.sample_models import write_sample_model
from scheduler.config import parse_catalogue
from scheduler.units import MIB

PATIENCE_S = 120.0  # generous: the machine may be busy with other things; nothing here measures time
TOKENS = 10  # of an ordinary answer
LONG = 3500  # tokens: seconds of streaming on any machine
T = TypeVar("T")

REFERENCE = """
import json, sys
import llama_cpp
import numpy as np

MARGIN = 0.05  # some ten times what another batch size or another device changes in a logit

for line in sys.stdin:
    path, count, max_tokens = json.loads(line)
    llama = llama_cpp.Llama(path, n_ctx=1024, n_gpu_layers=0, n_threads=1, flash_attn=True, verbose=False)
    clear = []
    for number in range(1, 100):
        prompt = f"{number} llamas"
        llama.reset()
        tokens = llama.tokenize(prompt.encode())
        margins = []
        for token in range(max_tokens):
            llama.eval(tokens if not margins else tokens[-1:])
            pointer = llama_cpp.llama_get_logits_ith(llama._ctx.ctx, -1)
            logits = np.ctypeslib.as_array(pointer, shape=(llama.n_vocab(),))
            second, first = np.argsort(logits)[-2:]
            margins.append(logits[first] - logits[second])
            tokens.append(int(first))
        if min(margins) > MARGIN:
            llama.reset()
            answer = llama.create_completion(prompt, max_tokens=max_tokens, temperature=0.0, repeat_penalty=1.0)
            clear.append((prompt, answer["choices"][0]["text"]))
        if len(clear) == count:
            break
    print(json.dumps(clear), flush=True)
"""


def eventually(holds: Callable[[], T], what: str) -> T:
    """The first true answer of `holds`; fails with `what` when there is none in good time."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        answer = holds()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        time.sleep(0.05)


@contextlib.contextmanager
def private_ray(**options: Any) -> Iterator[None]:
    """A Ray of one node, for this process alone."""
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * MIB,
        **options,
    )
    try:
        yield
    finally:
        take_down()
        ray.shutdown()


class Reference:
    """What llama.cpp itself answers, greedily, on the CPU alone: `llama_cpp.Llama` in a process of its own.

    Only prompts whose every next token wins clearly: where two are almost equal, the size of a batch decides.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", REFERENCE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lock = threading.Lock()
        self._known: dict[tuple[Path, int, int], list[tuple[str, str]]] = {}

    def questions(self, path: Path, count: int = 1, max_tokens: int = TOKENS) -> list[tuple[str, str]]:
        """So many prompts with their answers."""
        key = (path, count, max_tokens)
        with self._lock:
            if key not in self._known:
                assert self._process.stdin is not None and self._process.stdout is not None
                self._process.stdin.write(json.dumps([str(path), count, max_tokens]) + "\n")
                self._process.stdin.flush()
                self._known[key] = [(prompt, text) for prompt, text in json.loads(self._process.stdout.readline())]
                assert len(self._known[key]) == count
            return self._known[key]

    def close(self) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()


class Service:
    """A running Arriero and what the tests ask of it."""

    def __init__(self, models: Path, /, **settings: Any) -> None:
        self.models = models
        self.deployment = self.bring_up(**settings)
        self.client = Client(self.deployment.url)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def bring_up(self, **settings: Any) -> Deployment:
        """`settings` as in a catalogue file."""
        settings = {"model_paths": [str(self.models)], "defaults": {"n_ctx": 1024}, "server": {"port": 0}, **settings}
        return bring_up(parse_catalogue(settings))

    def path(self, model: str) -> Path:
        return self.models / f"{model}.gguf"

    def complete(self, model: str, prompt: str, max_tokens: int = TOKENS, **options: Any) -> str:
        """A greedy completion."""
        return self.client.complete(model, prompt, max_tokens=max_tokens, temperature=0.0, **options).text

    def replicas(self, model: str = "") -> list[ReplicaStatus]:
        return [replica for replica in self.client.status().replicas if model in ("", replica.model)]

    def replica(self, model: str) -> ReplicaStatus:
        (replica,) = self.replicas(model)
        return replica

    def notices(self, kind: str, after: int = 0) -> list[Any]:
        return [notice for notice in self.client.events(after=after, follow=False) if notice.kind == kind]

    def last_seq(self) -> int:
        return self.client.status().last_notice_seq

    def unload_all(self) -> None:
        """Everything out, and proof that all memory is back."""
        for model in {replica.model for replica in self.replicas()}:
            self.client.unload(model)
        self.await_empty()

    def await_empty(self) -> None:
        eventually(lambda: not self.replicas(), "all replicas to end")
        for gpu in self.client.status().gpus:
            assert (gpu.used_bytes, gpu.booked_bytes) == (0, 0), gpu
        for node in self.client.status().nodes:
            assert node.memory_reserved_bytes == 0, node


class Listener(threading.Thread):
    """A client that streams a long answer, from its first piece on."""

    def __init__(self, service: Service, model: str) -> None:
        super().__init__(daemon=True)
        self.text = ""
        self.error: ArrieroError | None = None
        self._begun, self._leaving = threading.Event(), threading.Event()
        self._client, self._model = Client(service.deployment.url), model
        self.start()
        assert self._begun.wait(60)

    def run(self) -> None:
        options: Any = {"max_tokens": LONG, "temperature": 0.0, "stream": True}
        try:
            with self._client, self._client.complete(self._model, "llamas", **options) as stream:
                for piece in stream:
                    self.text += piece
                    self._begun.set()
                    if self._leaving.is_set():
                        break
        except ArrieroError as error:
            self.error = error
        finally:
            self._begun.set()

    def goes_on(self) -> bool:
        """Whether more text comes."""
        so_far = len(self.text)
        return bool(eventually(lambda: not self.is_alive() or len(self.text) > so_far, "more text")) and self.is_alive()

    def leave(self) -> None:
        """Close the connection."""
        self._leaving.set()
        self.end()

    def end(self) -> None:
        self.join(120)
        assert not self.is_alive()


def works(service: Service, reference: Reference, model: str) -> bool:
    ((prompt, answer),) = reference.questions(service.path(model))
    return service.complete(model, prompt) == answer


def answers(service: Service) -> bool:
    try:
        return service.client.health().status == "ok"
    except (Unavailable, httpx.HTTPError):
        return False


def processes_of(actor: str) -> list[psutil.Process]:
    """The processes of that actor class that descend from this one, by the title that Ray gives them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith(f"ray::{actor}"[:15]) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def process_of(actor: str) -> psutil.Process:
    (process,) = processes_of(actor)
    return process


@contextlib.contextmanager
def suspended(processes: Iterable[psutil.Process]) -> Iterator[None]:
    """They stand still meanwhile: nothing that they would do or say happens. Be quick: their node ends them after five
    seconds.
    """
    stopped = list(processes)
    assert stopped
    for process in stopped:
        process.suspend()
    try:
        yield
    finally:
        for process in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def write_llama(path: Path, *, seed: int = 0, **sizes: int) -> Path:
    return write_sample_model(path, "llama", seed=seed, **sizes)


def write_huge(path: Path, size_bytes: int) -> None:
    """A sound header over a hole: the file claims weights of `size_bytes` and takes a few KiB of disk."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(4096)
    writer.add_embedding_length(4096)
    writer.add_feed_forward_length(4096)
    writer.add_head_count(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(512)
    writer.add_tokenizer_model("no_vocab")
    for name, rows in (("token_embd", 512), ("blk.0.ffn_up", size_bytes // 4096 // 2)):
        writer.add_tensor_info(f"{name}.weight", [rows, 4096], np.dtype(np.float16), rows * 4096 * 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size_bytes + 512 * 4096 * 2 + 4096)
