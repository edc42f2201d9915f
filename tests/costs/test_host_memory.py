"""What a runner's process takes in host RAM, predicted and seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from gguf_shapes import SMALL, Spec, model_file, write_model

from scheduler.costs.footprint import footprint
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.host import HostMemory, host_memory
from scheduler.costs.params import ContextParams, DeviceSpec, Layout
from scheduler.costs.shape import read_shape
from scheduler.units import KIB, MIB

WORDY = replace(SMALL["llama"], n_vocab=200_000)
WIDE = replace(SMALL["llama"], n_embd=512, n_head=8, n_head_kv=8, head=64, n_ff=2048, n_vocab=32_000, mix="q4_k_m")
CARD = DeviceSpec("gpu0", "cuda")


def predicted(path: Path, context: ContextParams, layout: Layout | None = None, **load: Any) -> HostMemory:
    shape, layout = read_shape(path), layout or Layout()
    return host_memory(
        shape, layout, context, footprint(shape, layout, context, CHECKED_BUILD), process_bytes=0, **load
    )


def seen(path: Path, context: ContextParams, **load: Any) -> dict[str, int]:
    request = {"path": str(path), "context": asdict(context), **load}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("host_truth.py")],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    answer: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.llama
@pytest.mark.parametrize(
    ("spec", "context", "load"),
    [
        (WORDY, ContextParams(n_ctx=4096), {}),
        (WORDY, ContextParams(n_ctx=4096), {"use_mmap": False}),
        (WIDE, ContextParams(n_ctx=16384, n_seq_max=2), {}),
        (WIDE, ContextParams(n_ctx=4096), {"use_extra_bufts": True}),
        (replace(SMALL["qwen3-embedding"], n_vocab=60_000), ContextParams(n_ctx=1024, embeddings=True), {}),
        (replace(SMALL["qwen3moe"], n_embd=512, n_ff_exp=512), ContextParams(n_ctx=4096), {}),
        (SMALL["mamba2"], ContextParams(n_ctx=4096), {}),
        (WORDY, ContextParams(n_ctx=4096, n_outputs_max=16, spec_type="ngram-simple"), {}),
    ],
    ids=[
        "large vocabulary",
        "read, not mapped",
        "long context",
        "repacked",
        "embeddings",
        "experts",
        "recurrent",
        "drafts",
    ],
)
def test_a_process_takes_no_more_than_predicted(
    spec: Spec, context: ContextParams, load: dict[str, Any], tmp_path: Path
) -> None:
    path = write_model(spec, tmp_path / "model.gguf")
    ours, truth = predicted(path, context, **load), seen(path, context, **load)
    assert truth["peak_bytes"] <= ours.peak_bytes
    assert truth["used_bytes"] <= ours.steady_bytes
    assert truth["mapped_bytes"] <= ours.mapped_while_loading_bytes + 4 * MIB  # libraries, too
    # all that is not a buffer that fills up later: cache, outputs, vocabulary, tables, weights that were read
    at_once = ours.steady_bytes - ours.growing_bytes - ours.repacked_bytes
    compute_bytes = footprint(read_shape(path), Layout(), context, CHECKED_BUILD).host.compute_bytes
    assert truth["loaded_bytes"] >= 0.8 * (at_once - compute_bytes) - 4 * MIB


def test_a_vocabulary_is_counted_by_its_tokens_and_merges(tmp_path: Path) -> None:
    plain, merged = model_file(WORDY, "plain"), model_file(WORDY, "merged")
    merged.set("tokenizer.ggml.merges", [f"w{i} w{i + 1}" for i in range(100_000)])
    few, many = (read_shape(g.write(tmp_path / f"{n}.gguf")).vocabulary for n, g in enumerate((plain, merged)))
    assert (few.n_tokens, few.n_merges, many.n_merges) == (200_000, 0, 100_000)
    assert few.text_bytes > 5 * 200_000
    assert many.resident_bytes - few.resident_bytes > 96 * 100_000
    trie = replace(few, model="t5")
    assert trie.resident_bytes > few.resident_bytes + 112 * few.n_tokens


def test_weights_are_staged_only_where_they_are_not_mapped(tmp_path: Path) -> None:
    path = write_model(replace(WIDE, n_vocab=320), tmp_path / "model.gguf")
    context, largest = ContextParams(n_ctx=1024), read_shape(path).largest_tensor_bytes
    on_card = Layout((CARD,), -1, (1,))
    away = Layout((DeviceSpec("gpu0", "rpc"),), -1, (1,))
    names = predicted(path, context, on_card).loading_bytes  # of the vocabulary alone
    assert predicted(path, context, on_card, use_mmap=False).loading_bytes == max(names, 4 * MIB)
    assert predicted(path, context, away, use_mmap=False).loading_bytes == 2 * largest
    assert predicted(path, context, away).loading_bytes == max(names, largest)


def test_nothing_is_repacked_beside_a_card(tmp_path: Path) -> None:
    path = write_model(WIDE, tmp_path / "model.gguf")
    half = Layout((CARD,), 3, (1,))
    context = ContextParams(n_ctx=1024)
    assert predicted(path, context, half, use_extra_bufts=True).repacked_bytes == 0
    alone = predicted(path, context, use_extra_bufts=True)
    assert alone.repacked_bytes == alone.mapped_bytes > 0
    read = predicted(path, context, use_mmap=False, use_extra_bufts=True)  # the only copy is the one in that order
    assert (read.mapped_bytes, read.repacked_bytes) == (0, read_shape(path).weights.tied.plain)


def test_embeddings_make_room_for_a_row_of_logits_per_token(tmp_path: Path) -> None:
    path = write_model(replace(SMALL["bert"], n_vocab=30_000), tmp_path / "model.gguf")
    context = ContextParams(n_ctx=512, embeddings=True)
    assert predicted(path, context).growing_bytes > 4 * 511 * 30_000
    both = write_model(replace(SMALL["llama"], n_vocab=30_000), tmp_path / "both.gguf")  # one by one, 16 MiB at a time
    plain, embeds = (predicted(both, ContextParams(n_ctx=2048, embeddings=flag)) for flag in (False, True))
    assert 15 * MIB < embeds.growing_bytes - plain.growing_bytes <= 16 * MIB


def test_wide_heads_and_many_threads_need_a_larger_work_buffer(tmp_path: Path) -> None:
    path = write_model(WIDE, tmp_path / "model.gguf")
    few, many = (predicted(path, ContextParams(n_ctx=512), n_threads=n).growing_bytes for n in (1, 65))
    arch = read_shape(path).arch
    assert many - few == 64 * (576 * KIB + 4 * (128 * (arch.n_head_k + arch.n_head_v) + 2 * 64 * 64))
