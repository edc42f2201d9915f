"""Log probabilities against llama-server's own, where LLAMA_SERVER names one of the pinned llama.cpp."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from patience import wait_until

from actors.serving.engine import Engine
from actors.serving.protocol import GenerateRequest, Sampling, content_of

SERVER = os.environ.get("LLAMA_SERVER", "")
pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not SERVER, reason="LLAMA_SERVER names no llama-server to compare with"),
]
WITHIN = 1e-5
COUNT = 24  # tokens of the answer
TEXT = "The traders of the valley carry salt and maize over the pass."


@pytest.fixture(scope="module", params=["f32", "f16"])
def model(request: pytest.FixtureRequest, sample: Any) -> Path:
    path: Path = sample("llama", request.param)
    return path


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address. It computes as the engine of these tests does."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [SERVER, "--model", str(model), "--port", str(port), "--ctx-size", "512", "--parallel", "1"]
    command += ["--threads", "2", "--flash-attn", "on", "--no-repack", "--no-warmup", "--no-webui"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as sink, subprocess.Popen(command, stdout=sink, stderr=sink) as process:
        try:
            url = f"http://127.0.0.1:{port}"

            def ready() -> bool:
                assert process.poll() is None, log.read_text()[-2000:]
                try:
                    with urllib.request.urlopen(f"{url}/health"):
                        return True
                except (urllib.error.URLError, ConnectionError):
                    return False

            wait_until(ready)
            yield url
        finally:
            process.terminate()


def asked(url: str, route: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(f"{url}{route}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        told: dict[str, Any] = json.load(answer)
    return told


def test_log_probabilities_are_those_of_llama_server(server: str, model: Path, spec: Any) -> None:
    """Of every token of the vocabulary in each place of a greedy answer, computed in batches of the same shape.

    llama-server's probabilities of all tokens do not quite add up to 1. The logarithm of their sum is in each of them,
    and is taken away.
    """
    prompt = asked(server, "/tokenize", content=TEXT, add_special=True)["tokens"]
    with closing(Engine(spec(model, n_ctx=512, n_ubatch=512, n_batch=2048))) as engine:
        settings: Any = {"max_tokens": COUNT, "n_probs": engine._model.n_vocab, "sampling": Sampling(temperature=0)}
        chunks = list(engine.generate(GenerateRequest(content_of(prompt=prompt), "r", **settings)))
    body = {"prompt": prompt, "n_predict": COUNT, "n_probs": settings["n_probs"], "temperature": 0}
    truth = asked(server, "/completion", **body)["completion_probabilities"]
    ours = [likelihood for chunk in chunks for likelihood in chunk.likelihoods]
    assert [each.token for each in ours] == [each["id"] for each in truth] and len(ours) == COUNT
    apart, excesses = [], []
    for one, other in zip(ours, truth, strict=True):
        assert one.piece == bytes(other["bytes"])
        mine = {token: logprob for token, _, logprob in one.top}
        theirs = {each["id"]: each["logprob"] for each in other["top_logprobs"]}
        assert mine.keys() == theirs.keys() and one.logprob == mine[one.token]
        excess = math.log(math.fsum(map(math.exp, theirs.values())))
        excesses.append(abs(excess))
        apart += [abs(theirs[token] - excess - logprob) for token, logprob in mine.items()]
    print(f"{len(apart)} log probabilities: {max(apart):.1e} apart; theirs add up to 1 within {max(excesses):.1e}")
    assert max(apart) <= WITHIN and max(excesses) <= 10 * WITHIN
