"""A cluster in words: machines, their GPUs, and the replicas that are loaded, for plans and simulations.

    nodes:
      - name: tower
        ram: 64GiB
        gpus: [{name: RTX 3090}, {name: RTX 3060, free: 11GiB}]
        replicas: [{model: mistral, file: mistral.gguf, gpus: [0], idle_s: 40}]

What is left out has a default; a known card's memory and rates come from `cards`. docs/planning.md lists every key.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from scheduler.config import Bytes
from scheduler.costs.params import DeviceKind, Rates
from scheduler.errors import Rejected
from scheduler.simulation.cards import known_card
from scheduler.units import GIB, MIB, parse_rate

Rate = Annotated[float, BeforeValidator(parse_rate), Field(json_schema_extra={"type": ["number", "string"]})]
UNKNOWN_CARD = Rates(bytes_per_s=300e9, flops=10e12)
"""What a card outside the table does, unless the description says."""


class _Described(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GpuDescription(_Described):
    """One GPU. `free` is what a tool such as nvidia-smi shows."""

    name: str = Field("", description="the card, as its driver calls it; known ones need no more")
    total: Bytes | None = Field(None, description="its memory; needed for cards that are not known")
    free: Bytes | None = Field(None, description="what is free of it now (all that no replica takes)")
    bandwidth: Rate | None = Field(None, description="bytes read from its memory per second, as 936GB/s")
    tflops: float | None = Field(None, gt=1e-6, lt=1e6, description="F32 arithmetic, in 10^12 operations per second")
    kind: DeviceKind = Field("cuda", description="cuda, or rpc for a virtual GPU")

    @model_validator(mode="after")
    def _has_memory(self) -> GpuDescription:
        if self.total is None and known_card(self.name) is None:
            raise ValueError(f"{self.name or 'a GPU'!r} is not a known card: give its total memory, as total: 24GiB")
        if self.total_bytes < MIB:
            raise ValueError(f"a GPU of {self.total_bytes} bytes is too small; write its memory as 24GiB")
        if self.free is not None and self.free > self.total_bytes:
            raise ValueError(f"free is {self.free} bytes, but the GPU has only {self.total_bytes}")
        return self

    @property
    def total_bytes(self) -> int:
        card = known_card(self.name)
        if self.total is not None:
            return self.total
        assert card is not None
        return card.total_bytes

    @property
    def rates(self) -> Rates:
        card = known_card(self.name)
        known = card.rates if card else UNKNOWN_CARD
        return Rates(self.bandwidth or known.bytes_per_s, self.tflops * 1e12 if self.tflops else known.flops)


class ReplicaDescription(_Described):
    """A loaded model. Its layers lie on the GPUs given, in shares that suit their memory."""

    model: str = Field(min_length=1)
    file: str = Field(description="its GGUF file, relative to the description")
    gpus: tuple[int, ...] = Field((), description="numbers of its GPUs on the node; none: it is in host RAM")
    n_ctx: int | None = Field(None, ge=256, description="its context (as the model's default)")
    idle_s: float = Field(0.0, ge=0, description="seconds since it was last used")
    busy: bool = Field(False, description="it serves a request now")
    pinned: bool = Field(False, description="it is never evicted")


class NodeDescription(_Described):
    """One machine."""

    name: str = Field(min_length=1)
    ram: Bytes = Field(32 * GIB)
    ram_free: Bytes | None = Field(None, description="what is free of it now (all that no replica takes)")
    cores: int = Field(8, ge=1, description="physical cores")
    ram_bandwidth: Rate = Field(40e9, description="bytes that all cores read per second (40GB/s)")
    tflops: float = Field(0.5, gt=1e-6, lt=1e6, description="F32 arithmetic of all cores (0.5)")
    disk_read: Rate | None = Field(None, description="bytes per second that loading gets from the disk (500MB/s)")
    labels: dict[str, str] = Field(default_factory=dict)
    gpus: tuple[GpuDescription, ...] = Field((), max_length=32)
    replicas: tuple[ReplicaDescription, ...] = ()

    @model_validator(mode="after")
    def _replicas_have_their_gpus(self) -> NodeDescription:
        for replica in self.replicas:
            missing = [number for number in replica.gpus if not 0 <= number < len(self.gpus)]
            if missing or len(set(replica.gpus)) < len(replica.gpus):
                raise ValueError(
                    f"replica {replica.model} is on GPUs {list(replica.gpus)}; {self.name} has {len(self.gpus)}, "
                    "counted from 0"
                )
        if self.ram_free is not None and self.ram_free > self.ram:
            raise ValueError(f"{self.ram_free} bytes of RAM free of {self.ram} cannot be")
        return self


class ClusterDescription(_Described):
    """The whole description."""

    nodes: tuple[NodeDescription, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> ClusterDescription:
        names = [node.name for node in self.nodes]
        if len(set(names)) < len(names):
            raise ValueError(f"two machines have the same name: {', '.join(sorted(names))}")
        return self


def parse_cluster(data: Any, source: str = "cluster") -> ClusterDescription:
    """The cluster in `data` (parsed YAML). Raises Rejected that names every wrong key and suggests the right one."""
    if not isinstance(data, dict):
        raise Rejected(f"{source}: a cluster is a mapping with the key nodes, not {type(data).__name__}")
    try:
        return ClusterDescription.model_validate(data)
    except ValidationError as invalid:
        # a part that is wrong is left out by pydantic, and then missed in the whole
        errors = [error for error in invalid.errors() if error["type"] != "too_short"] or invalid.errors()
        raise Rejected(f"{source}: " + "; ".join(map(_explain, errors))) from invalid


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{where or 'nodes'}: {error['msg'].removeprefix('Value error, ')}"
    *path, key = error["loc"]
    depth = [part for part in path if isinstance(part, str)]
    records: dict[int, type[BaseModel]] = {0: ClusterDescription, 1: NodeDescription}
    record = records.get(len(depth)) or (GpuDescription if depth[-1] == "gpus" else ReplicaDescription)
    known = sorted(record.model_fields)
    close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    return f"unknown key {where}; " + (f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}")
