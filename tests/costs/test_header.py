"""Reading headers: what is valid is understood in all its dialects, what is not is refused with an offset."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf as reference
import llama_cpp
import pytest
from gguf_file import ARRAY, I32, STRING, U32, U64, Gguf, add_vocabulary
from gguf_shapes import SMALL, model_file, tensors, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scheduler.costs.ggml_types import FILE_TYPES, KV_TYPES, TYPES
from scheduler.costs.header import MAX_KEYS, MAX_STRINGS, MAX_TENSORS, Array, read_header
from scheduler.costs.shape import read_shape
from scheduler.errors import InvalidGGUF

Edit = Callable[[Gguf], object]


def small(**dialect: object) -> Gguf:
    """A valid file of a few keys and tensors."""
    file = Gguf(**dialect)  # type: ignore[arg-type]
    file.set("general.architecture", "llama")
    file.set("general.name", "caf\u00e9")
    file.set("llama.block_count", 2)
    file.set("llama.rope.freq_base", 500000.0)
    file.set("llama.attention.head_count_kv", [2, 0])
    file.set("llama.flags", [True, False])
    add_vocabulary(file, 300)
    file.tensors = [
        ("token_embd.weight", (64, 300), "f16"),
        ("blk.0.attn_q.weight", (64, 64), "q8_0"),
        ("output_norm.weight", (64,), "f32"),
    ]
    return file


def test_types_are_those_of_the_gguf_package() -> None:
    theirs = {int(kind): (kind.name.lower(), *size) for kind, size in reference.GGML_QUANT_SIZES.items()}
    del theirs[9]  # q8_1 has lost 4 bytes since; it never occurs in files
    ours = {kind.id: (kind.name.lower(), kind.block, kind.block_bytes) for kind in TYPES.values()}
    assert theirs.items() <= ours.items()
    assert set(KV_TYPES) == {"f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("order", ["<", ">"])
def test_versions_and_byte_orders(version: int, order: str, tmp_path: Path) -> None:
    file = small(version=version, order=order)
    header = read_header(file.write(tmp_path / "model.gguf"))
    assert (header.version, header.endianness) == (version, "little" if order == "<" else "big")
    assert header.metadata["general.name"] == "caf\u00e9"
    assert header.metadata["llama.rope.freq_base"] == 500000.0
    assert header.metadata["llama.attention.head_count_kv"] == Array("int32", 2, (2, 0))
    assert header.metadata["llama.flags"] == Array("bool", 2, (True, False))
    assert header.metadata["tokenizer.ggml.tokens"] == Array("string", 300, None)
    assert header.metadata["tokenizer.ggml.scores"] == Array("float32", 300, None)
    assert [(t.name, t.ne, t.type.name) for t in header.tensors] == [(n, ne, kind) for n, ne, kind in file.tensors]
    assert [t.offset for t in header.tensors] == [0, 38400, 38400 + 4352]
    assert header.header_bytes == len(file.header())
    assert header.data_offset % 32 == 0
    assert header.file_bytes >= header.data_offset + header.tensors[-1].offset + header.tensors[-1].n_bytes


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    import numpy as np

    writer = reference.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(3)
    writer.add_token_list(["a", "b"])
    writer.add_custom_alignment(64)
    writer.add_tensor("output_norm.weight", np.ones(7, np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.ones((4, 8), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "model.gguf")
    assert header.alignment == 64
    assert header.metadata["llama.block_count"] == 3
    assert [(t.name, t.ne, t.offset, t.n_bytes) for t in header.tensors] == [
        ("output_norm.weight", (7,), 0, 28),
        ("blk.0.attn_q.weight", (8, 4), 64, 64),
    ]


@pytest.mark.slow
def test_a_large_vocabulary_is_stepped_over_not_kept(tmp_path: Path) -> None:
    file = Gguf()
    file.set("general.architecture", "llama")
    add_vocabulary(file, 128_256, n_merges=280_000)
    path = file.write(tmp_path / "vocabulary.gguf")
    tracemalloc.start()
    try:
        header = read_header(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert header.metadata["tokenizer.ggml.merges"] == Array("string", 280_000, None)
    assert header.header_bytes > 5_000_000
    assert peak < 8 * 2**20


def _bytes_claim(at_key: str, claim: bytes) -> Edit:
    """Overwrite what follows `at_key` in the header."""

    def edit(file: Gguf) -> bytes:
        header = bytearray(file.header())
        position = header.index(at_key.encode()) + len(at_key)
        header[position : position + len(claim)] = claim
        return bytes(header)

    return edit


HOSTILE: dict[str, tuple[Edit, str]] = {
    "empty": (lambda f: b"", "the file is empty"),
    "not a gguf": (lambda f: b"GGML" + f.header()[4:], "not a GGUF"),
    "version 1": (lambda f: b"GGUF" + struct.pack("<I", 1) + f.header()[8:], "version 1"),
    "version 4": (lambda f: b"GGUF" + struct.pack("<I", 4) + f.header()[8:], "version 4"),
    "tensor count": (lambda f: f.header()[:8] + struct.pack("<Q", 2**63) + f.header()[16:], "tensors"),
    "tensors beyond the limit": (
        lambda f: f.header()[:8] + struct.pack("<Q", MAX_TENSORS + 1) + f.header()[16:], "absurd",
    ),
    "key count": (lambda f: f.header()[:16] + struct.pack("<Q", MAX_KEYS + 1) + f.header()[24:], "metadata keys"),
    "key length": (lambda f: f.header()[:24] + struct.pack("<Q", 2**62) + f.header()[32:], "a metadata key"),
    "value type": (_bytes_claim("llama.block_count", struct.pack("<I", 99)), "unknown value type"),
    "string length": (_bytes_claim("general.name", struct.pack("<IQ", STRING, 2**40)), "bytes long"),
    "string past the end": (_bytes_claim("general.name", struct.pack("<IQ", STRING, 1_000_000)), "past the end"),
    "array length": (
        _bytes_claim("llama.flags", struct.pack("<IIQ", ARRAY, 7, 2**60)), "past the end",
    ),
    "strings": (_bytes_claim("tokenizer.ggml.tokens", struct.pack("<IIQ", ARRAY, STRING, MAX_STRINGS + 1)), "strings"),
    "strings past the end": (_bytes_claim("tokenizer.ggml.tokens", struct.pack("<IIQ", ARRAY, STRING, 10_000)), "end"),
    "one endless string": (
        _bytes_claim("tokenizer.ggml.tokens", struct.pack("<IIQQ", ARRAY, STRING, 300, 2**63)), "end",
    ),
    "nested array": (_bytes_claim("llama.flags", struct.pack("<II", ARRAY, ARRAY)), "holds arrays"),
    "array type": (_bytes_claim("llama.flags", struct.pack("<II", ARRAY, 77)), "element type"),
    "dimensions": (_bytes_claim("blk.0.attn_q.weight", struct.pack("<I", 5)), "dimensions"),
    "huge dimension": (_bytes_claim("blk.0.attn_q.weight", struct.pack("<IQ", 2, 2**62)), "absurd dimensions"),
    "zero dimension": (_bytes_claim("blk.0.attn_q.weight", struct.pack("<IQ", 2, 0)), "absurd dimensions"),
    "beyond the file": (_bytes_claim("output_norm.weight", struct.pack("<IQ", 1, 2**40)), "past the end"),
    "partial block": (_bytes_claim("blk.0.attn_q.weight", struct.pack("<IQ", 2, 63)), "multiple of 32"),
    "tensor type": (_bytes_claim("blk.0.attn_q.weight", struct.pack("<IQQI", 2, 64, 64, 4)), "type 4"),
    "overlap": (_bytes_claim("blk.0.attn_q.weight", struct.pack("<IQQIQ", 2, 64, 64, 8, 0)), "overlaps"),
    "gap": (_bytes_claim("blk.0.attn_q.weight", struct.pack("<IQQIQ", 2, 64, 64, 8, 2**20)), "gap"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_with_an_offset(case: str, tmp_path: Path) -> None:
    edit, words = HOSTILE[case]
    data = edit(small())
    assert isinstance(data, bytes)
    path = tmp_path / "model.gguf"
    path.write_bytes(data + bytes(100_000 if data else 0))
    with pytest.raises(InvalidGGUF, match=words) as caught:
        read_header(path)
    assert caught.value.details["path"] == str(path)
    assert 0 <= caught.value.details["offset"] <= len(data)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda f: f.tensors.append(f.tensors[0]), "two tensors are named"),
        (lambda f: f.metadata.update({"": (U32, 1)}), "key is empty"),
        (lambda f: f.metadata.update({"general.alignment": (U32, 48)}), "power of two"),
        (lambda f: f.metadata.update({"general.alignment": (U64, 2**40)}), "power of two"),
        (lambda f: f.metadata.update({"general.alignment": (STRING, "32")}), "power of two"),
        (lambda f: f.tensors.append(("n" * 64, (1,), "f32")), "at most 63"),
    ],
)
def test_contradictions_are_refused(edit: Edit, words: str, tmp_path: Path) -> None:
    file = small()
    edit(file)
    with pytest.raises(InvalidGGUF, match=words):
        read_header(file.write(tmp_path / "model.gguf"))


def test_a_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    file = small()
    file.metadata["llama.block_counT"] = (I32, 3)
    data = file.header().replace(b"llama.block_counT", b"llama.block_count") + bytes(100_000)
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(InvalidGGUF, match="occurs twice"):
        read_header(tmp_path / "model.gguf")


def test_truncation_is_told_from_corruption(tmp_path: Path) -> None:
    path = small().write(tmp_path / "model.gguf")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1000)
    with pytest.raises(InvalidGGUF, match="truncated"):
        read_header(path)


def test_a_sparse_sea_of_zeros_ends_quickly(tmp_path: Path) -> None:
    """A terabyte that claims to be one long vocabulary: the walk gives up at its limits, not at the file's end."""
    file = Gguf()
    file.set("general.architecture", "llama")
    header = file.header() + struct.pack("<Q", 5) + b"words" + struct.pack("<IIQ", ARRAY, STRING, MAX_STRINGS)
    header = header[:16] + struct.pack("<Q", 2) + header[24:]
    path = tmp_path / "zeros.gguf"
    with path.open("wb") as out:
        out.write(header)
        out.truncate(1 << 40)
    assert read_header(path).metadata["words"] == Array("string", MAX_STRINGS, None)
    with path.open("r+b") as out:  # the same with strings that leap far ahead each time
        out.seek(len(header))
        out.write(struct.pack("<Q", 2**38))
    with pytest.raises(InvalidGGUF, match="absurd"):
        read_header(path)


@pytest.fixture(scope="module")
def valid_header(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    return tmp_path_factory.mktemp("fuzz") / "model.gguf", small().header()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    cuts=st.lists(st.tuples(st.integers(0, 7000), st.binary(max_size=12)), max_size=4),
    end=st.integers(0, 200_000),
)
@pytest.mark.slow
def test_mutated_headers_are_read_or_refused(
    valid_header: tuple[Path, bytes], cuts: list[tuple[int, bytes]], end: int
) -> None:
    path, header = valid_header
    data = bytearray(header)
    for position, piece in cuts:
        data[position % len(data) : position % len(data) + len(piece)] = piece
    path.write_bytes((bytes(data) + bytes(100_000))[:end])
    try:
        read = read_header(path)
    except InvalidGGUF as error:
        assert 0 <= error.details["offset"] <= max(end, len(header) + 100_000)
    else:
        assert read.data_offset <= read.file_bytes or not read.tensors


@pytest.mark.parametrize("name", SMALL)
def test_shapes_have_the_tensors_they_list(name: str, tmp_path: Path) -> None:
    header = read_header(write_model(SMALL[name], tmp_path / "model.gguf", vocabulary=False))
    assert [(t.name, t.ne) for t in header.tensors] == list(tensors(SMALL[name]))


def test_mixtures_of_types_have_the_names_that_llama_cpp_gives_them() -> None:
    theirs = {
        number: name.removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_").removeprefix("ALL_")
        for name, number in vars(llama_cpp).items()
        if name.startswith("LLAMA_FTYPE_") and number < llama_cpp.LLAMA_FTYPE_GUESSED
    }
    assert theirs == FILE_TYPES


@pytest.mark.parametrize(
    ("file_type", "shown"), [(15, "Q4_K_M"), (1, "F16"), (None, "Q8_0"), (33, "Q8_0"), ("15", "Q8_0"), ([15], "Q8_0")]
)
def test_a_model_is_shown_as_what_its_file_says_it_is(file_type: object, shown: str, tmp_path: Path) -> None:
    """Else as the type of most bytes: embeddings may outweigh all layers of a small model."""
    gguf = model_file(SMALL["llama-q8"], "model")
    if file_type is not None:
        gguf.set("general.file_type", file_type)
    assert read_shape(gguf.write(tmp_path / "model.gguf")).quantization == shown


@pytest.mark.parametrize("name", ["llama", "qwen3moe", "gemma3", "deepseek2", "bert", "nomic-bert", "jina-bert-v2"])
def test_a_model_without_a_key_that_llama_cpp_needs_is_refused(name: str, tmp_path: Path) -> None:
    """Though no cost depends on it: llama.cpp would refuse the file after a place has been made for it."""
    path = model_file(SMALL[name], name).write(tmp_path / "whole.gguf")
    arch = read_shape(path).architecture
    epsilon = "layer_norm_epsilon" if "bert" in name else "layer_norm_rms_epsilon"
    needed = [f"{arch}.attention.{epsilon}", *["tokenizer.ggml.token_type_count"] * ("bert" in name)]
    for key in needed:
        gguf = model_file(SMALL[name], name)
        del gguf.metadata[key]
        lacking = gguf.write(tmp_path / "lacking.gguf")
        with pytest.raises(InvalidGGUF, match=f"{key} is missing, which llama.cpp needs for {arch} models"):
            read_shape(lacking)
