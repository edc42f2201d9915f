"""The shape of a model: everything about its files that costs are computed from, read once and passed around.

A `ModelShape` is frozen and picklable; two shapes are equal only when they are the same object, so it is cheap to use
as a key. Byte sums per layer are made here, so that a footprint costs additions only.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from scheduler.costs.architecture import Architecture, read_architecture
from scheduler.costs.cache import place_cache
from scheduler.costs.demand import ModelDemand, model_demand
from scheduler.costs.families import row_of
from scheduler.costs.ggml_types import FILE_TYPES
from scheduler.costs.graph.model import GraphModel, graph_model
from scheduler.costs.header import Array, Header, Tensor, read_header
from scheduler.costs.metadata import Metadata
from scheduler.costs.params import ContextParams, Layout
from scheduler.costs.predictor import Predictor, read_predictor
from scheduler.costs.projector import Projector
from scheduler.costs.vocabulary import Vocabulary, read_vocabulary
from scheduler.costs.weights import HOST, StoredSums, WeightSums, sum_stored, sum_weights
from scheduler.errors import InvalidGGUF

MAX_PARTS = 1024
_PART = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, eq=False)
class ModelShape:
    """Facts of one model. Bytes are as stored in the file, without the padding that a device adds."""

    paths: tuple[str, ...]
    file_bytes: int
    name: str | None
    arch: Architecture
    n_vocab: int
    vocabulary: Vocabulary
    stored: StoredSums
    weights: WeightSums
    predictor: Predictor | None
    """The prediction layers (nextn, MTP), where the model has some that llama.cpp can run."""
    demand: ModelDemand
    """What the compute buffers are bounded from, where no template draws the model's graph."""
    graph: GraphModel
    weights_bytes: int
    experts_bytes: int
    quantization: str
    """llama.cpp's name of the mixture of types, as Q4_K_M; where the file names none, the type of most bytes."""
    largest_tensor_bytes: int
    widest_row: int
    """Elements of the longest row that a matrix of a layer is multiplied by, for all experts in use together."""
    has_chat_template: bool
    n_tensors: int
    """Of the model's own file."""
    fingerprint: str
    """Two files with the same cost the same: a digest of all that their headers say but for the vocabulary."""
    adapter_weights: tuple[WeightSums, ...] = ()
    """The part of `weights` that LoRA adapters add, which is never mapped."""
    n_adapter_pairs: int = 0
    projector: Projector | None = None
    """That is loaded beside it; nothing of it is in the other figures but the fingerprint."""
    draft: ModelShape | None = None
    """A smaller model that guesses for it; likewise."""
    runs_predictor: bool = False
    """Its prediction layers guess for it: their weights are among its own, their context lies beside it."""

    @property
    def architecture(self) -> str:
        return self.arch.name

    @property
    def known_architecture(self) -> bool:
        """False: the formulas do not know this architecture, so every figure is a cautious bound."""
        return self.arch.known

    @property
    def n_layer_all(self) -> int:
        return self.arch.n_layer_all

    @property
    def n_ctx_train(self) -> int:
        return self.arch.n_ctx_train

    @property
    def n_embd(self) -> int:
        return self.arch.n_embd

    @property
    def n_expert(self) -> int:
        return self.arch.n_expert

    @property
    def n_expert_used(self) -> int:
        return self.arch.n_expert_used

    @property
    def is_moe(self) -> bool:
        return self.experts_bytes > 0

    @cached_property
    def is_recurrent(self) -> bool:
        """Some layers carry state that grows with sequences, not with context."""
        return any(layer.is_recurrent for layer in self.arch.layers)

    def cache_bytes(self, context: ContextParams) -> int:
        """The whole cache and state in that context, in host RAM. Raises Rejected for one that llama.cpp refuses."""
        return place_cache(self.arch, Layout(), (HOST,) * (self.n_layer_all + 1), context)[1]

    @property
    def is_embedding_only(self) -> bool:
        """Embeds texts (or ranks them) and writes none."""
        return self.arch.row.family == "encoder" or self.arch.pools


def _metadata(header: Header, tensors: Mapping[str, Tensor]) -> Metadata:
    """What the header says, as llama.cpp takes it: deepseek4 without the tensors of a prediction layer has none."""
    meta = Metadata(header.metadata, header.path)
    key = "nextn_predict_layers"
    if meta.arch == "deepseek4" and (count := meta.number(key, 0)):
        first = meta.number("block_count") - count
        if f"blk.{first}.nextn.eh_proj.weight" not in tensors:
            return Metadata({**meta.values, f"{meta.arch}.{key}": 0}, meta.path)
    return meta


def read_shape(path: str | os.PathLike[str], read: Callable[[Path], Header] = read_header) -> ModelShape:
    """The shape of the model in `path`, which may be any part of a multi-file model. `read`: gives the header of each
    part (that of a file on this machine, if not said otherwise).

    Raises InvalidGGUF when a part is missing, damaged, or belongs to another model, and OSError when a part cannot be
    read.
    """
    headers = _parts(Path(path), read)
    first = headers[0]
    tensors: dict[str, Tensor] = {}
    for header in headers:
        for tensor in header.tensors:
            if tensor.name in tensors:
                raise InvalidGGUF(
                    f"{header.path}: tensor {tensor.name!r} is also in another part", path=header.path, offset=0
                )
            tensors[tensor.name] = tensor
    meta = _metadata(first, tensors)
    expected = first.metadata.get("split.tensors.count", len(tensors)) if len(headers) > 1 else len(tensors)
    if expected != len(tensors):
        raise meta.refuse(f"the parts hold {len(tensors)} tensors together, {expected} are expected")
    if not tensors:
        raise meta.refuse("the file holds no tensors: it is a vocabulary, not a model")
    arch = read_architecture(meta)
    _check_keys(meta)
    by_type: dict[str, int] = {}
    for tensor in tensors.values():
        by_type[tensor.type.name] = by_type.get(tensor.type.name, 0) + tensor.n_bytes
    weights = sum_weights(arch, tensors)
    n_vocab = _n_vocab(meta, tensors)
    name = first.metadata.get("general.name")
    return ModelShape(
        paths=tuple(header.path for header in headers),
        file_bytes=sum(header.file_bytes for header in headers),
        name=name if isinstance(name, str) else None,
        arch=arch,
        n_vocab=n_vocab,
        vocabulary=read_vocabulary(meta, n_vocab),
        stored=sum_stored(arch, tensors),
        weights=weights,
        predictor=read_predictor(arch, tensors, n_vocab),
        demand=model_demand(arch, tensors, n_vocab),
        graph=graph_model(arch, meta, tensors),
        weights_bytes=sum(by_type.values()),
        experts_bytes=weights.experts_bytes,
        quantization=_quantization(meta, by_type),
        largest_tensor_bytes=max(tensor.n_bytes for tensor in tensors.values()),
        widest_row=max(_row(arch, tensor) for tensor in tensors.values()),
        has_chat_template="tokenizer.chat_template" in first.metadata,
        n_tensors=len(tensors),
        fingerprint=_fingerprint(meta, tensors, n_vocab),
    )


def _check_keys(meta: Metadata) -> None:
    """Raise InvalidGGUF where a key is missing that costs nothing, but without which llama.cpp refuses the model."""
    row = row_of(meta.arch)
    epsilon = {"variance": "layer_norm_epsilon", "squares": "layer_norm_rms_epsilon"}.get(row.norms)
    wanted = [f"{meta.arch}.attention.{epsilon}"] if epsilon else []
    wanted += ["tokenizer.ggml.token_type_count"] if row.token_types else []
    for key in wanted:
        if not meta.values.get(key):
            raise meta.refuse(
                f"metadata key {key} is missing, which llama.cpp needs for {meta.arch} models; convert the model anew"
            )


def _quantization(meta: Metadata, bytes_by_type: Mapping[str, int]) -> str:
    named = meta.values.get("general.file_type")
    if isinstance(named, int) and named in FILE_TYPES:
        return FILE_TYPES[named]
    return max(bytes_by_type, key=lambda kind: bytes_by_type[kind]).upper()


def _row(arch: Architecture, tensor: Tensor) -> int:
    if len(tensor.ne) < 2 or not tensor.name.startswith("blk."):
        return 0
    return tensor.ne[0] * (max(arch.n_expert_used, 1) if len(tensor.ne) > 2 else 1)


def _fingerprint(meta: Metadata, tensors: dict[str, Tensor], n_vocab: int) -> str:
    facts = sorted(
        (key, repr(value)) for key, value in meta.values.items() if not key.startswith(("general.", "tokenizer."))
    )
    layout = [(tensor.name, tensor.type.id, tensor.ne) for tensor in tensors.values()]
    return hashlib.blake2b(repr((meta.arch, n_vocab, facts, layout)).encode(), digest_size=16).hexdigest()


def _n_vocab(meta: Metadata, tensors: dict[str, Tensor]) -> int:
    """Tokens in the vocabulary: the list's length, as llama.cpp counts, or else the embedding's rows."""
    tokens = meta.values.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Array):
        return tokens.length
    rows = tensors["token_embd.weight"].ne[-1] if "token_embd.weight" in tensors else 0
    return meta.number("vocab_size", rows)


def _parts(path: Path, read: Callable[[Path], Header]) -> list[Header]:
    """Headers of all parts, in order."""
    match = _PART.fullmatch(path.name)
    if match is None:
        header = read(path)
        _check_part(header, 0, 1)
        return [header]
    count = int(match["count"])
    if not 0 < count <= MAX_PARTS or int(match["no"]) not in range(1, count + 1):
        raise InvalidGGUF(
            f"{path}: part {match['no']} of {match['count']} is not possible; rename the file", path=str(path), offset=0
        )
    headers = []
    for no in range(1, count + 1):
        part = path.with_name(f"{match['stem']}-{no:05d}-of-{count:05d}.gguf")
        try:
            header = read(part)
        except FileNotFoundError:
            raise InvalidGGUF(
                f"{part}: part {no} of {count} is missing; download it again", path=str(part), offset=0
            ) from None
        _check_part(header, no - 1, count)
        headers.append(header)
    return headers


def _check_part(header: Header, no: int, count: int) -> None:
    """The metadata must agree with the file's name about which part this is."""
    said_count = header.metadata.get("split.count", 1)
    said_no = header.metadata.get("split.no", 0)
    if (said_count or 1) != count or count > 1 and said_no != no:
        raise InvalidGGUF(
            f"{header.path}: the file says that it is part {said_no} (from 0) of {said_count}, "
            f"its name says {no} of {count}; rename it to what llama-gguf-split wrote",
            path=header.path,
            offset=0,
        )
