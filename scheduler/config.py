"""The catalogue file: models by name, policy, reserves and ports.

A directory of GGUF files needs none of it: every field has a default, and `model_paths` alone is a whole catalogue.
Unknown keys are errors that suggest the right one. Sizes may be written "2GiB"; durations are seconds.
"""

from __future__ import annotations

import difflib
import json
import re
from math import isqrt
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator, model_validator

from scheduler.entry_parts import AdapterEntry, Alternative, CacheType, Strict, VectorSizes
from scheduler.errors import Rejected
from scheduler.server import Server
from scheduler.units import GIB, MIB, parse_bytes

Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0, json_schema_extra={"type": ["integer", "string"]})]
Slots = Annotated[int, Field(ge=1, le=64)] | Literal["auto"]
Context = Annotated[int, Field(ge=256)] | Literal["auto"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/+-]{0,199}")
NO_MMPROJ = "none"
MOST_IMAGE_TOKENS = 2**14


class ModelParams(Strict):
    """How models are loaded; llama.cpp's names and meanings. Given under `defaults` and, to override, per model."""

    n_ctx: Context | None = Field(
        None,
        description="context of all slots together; none: the trained context, 8192 per slot at most; auto: the same, "
        "and more if its GPUs have free VRAM",
    )
    n_seq_max: Slots | None = Field(
        None,
        description="slots: requests served at the same time; auto: 4 that share one cache, if that takes no larger "
        "cache than one slot, else 1 (auto)",
    )
    n_batch: int | None = Field(None, ge=32, description="prompt tokens per llama_decode (2048)")
    n_ubatch: int | None = Field(None, ge=32, description="prompt tokens per graph; sets the compute buffer (512)")
    type_k: CacheType | None = Field(None, description="type of the K cache (f16)")
    type_v: CacheType | None = Field(None, description="type of the V cache (f16); quantised needs flash_attn on")
    flash_attn: Literal["on", "off"] | None = Field(None, description="flash attention (on)")
    kv_unified: bool | None = Field(
        None, description="one KV cache shared by all slots (false; true if n_seq_max is auto and gives 4)"
    )
    swa_full: bool | None = Field(None, description="full-size cache for sliding-window layers (false)")
    use_mmap: bool | None = Field(None, description="map the file instead of reading it (true)")
    use_extra_bufts: bool | None = Field(
        None, description="repack host weights for faster prefill on the CPU, at up to twice their memory (false)"
    )
    embeddings: bool | None = Field(None, description="serve /v1/embeddings from this model (embedding models: true)")
    spec_type: Literal["none", "ngram-simple", "draft-simple", "draft-mtp"] | None = Field(
        None,
        description="speculative decoding, used where it is faster: draft tokens from the earlier text (ngram-simple), "
        "with a smaller model (draft-simple), or with the model's own prediction layers (draft-mtp) (none; "
        "draft-simple with a model_draft)",
    )
    spec_draft_n_max: int | None = Field(
        None, ge=1, le=15, description="maximum number of tokens of an answer that are drafted at once (15)"
    )
    spec_draft_p_min: float | None = Field(
        None, ge=0, le=1, description="drafting stops where the most likely token has a lower probability (0)"
    )
    chat_template: str | None = Field(None, min_length=1, description="Jinja template of chats, instead of the file's")
    alternatives: tuple[Alternative, ...] | None = Field(
        None,
        description="other contexts and caches, in order of preference: if the model does not fit wholly on GPUs now, "
        "the first alternative that does; if it does not fit at all, the first that fits",
    )
    spill: bool | None = Field(None, description="whether all or part of it may be in host RAM (true)")
    max_gpus: int | None = Field(None, ge=1, description="maximum number of GPUs; none: as many as a machine has")
    gpus: tuple[str, ...] | None = Field(
        None, min_length=1, description="only these GPUs: UUID, label (gpu0) or node/label (box1/gpu0)"
    )
    nodes: tuple[str, ...] | None = Field(None, min_length=1, description="only on these machines, by host name")
    labels: dict[str, str] | None = Field(None, description="only on machines with these labels")
    near: tuple[str, ...] | None = Field(None, description="on the same machine as these models, while they are loaded")
    not_with: tuple[str, ...] | None = Field(None, description="never on the same GPU as these models")
    min_tokens_per_s: float | None = Field(
        None, gt=0, description="only where this speed is predicted; places of unknown speed count as fast enough"
    )
    priority: int | None = Field(
        None,
        ge=-10,
        le=10,
        description="priority of requests that name none; it also protects from eviction: each step doubles the "
        "model's regret (0)",
    )
    min_replicas: int | None = Field(None, ge=0, le=64, description="number of replicas that are always loaded (0)")
    max_replicas: int | None = Field(
        None,
        ge=1,
        le=64,
        description="maximum number of replicas: another one is loaded on free GPUs when requests would wait more than "
        "twice the load time; none: as many as have room",
    )
    keep_alive_s: float | None = Field(
        None, ge=0, description="unload after this many idle seconds; none: when its memory is needed"
    )

    @field_validator("flash_attn", mode="before")
    @classmethod
    def _yaml_booleans(cls, value: object) -> object:
        """YAML 1.1 reads a bare `on` or `off` as a boolean."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class ModelEntry(ModelParams):
    """One model of the catalogue."""

    path: str = Field(description="GGUF file or glob on the nodes; for a model in several files, the first one")
    pinned: bool = Field(False, description="never evict it once loaded")
    adapters: dict[str, AdapterEntry] = Field(
        default_factory=dict, description="LoRA adapters by name; requests choose from them"
    )
    mmproj: str | None = Field(
        None,
        min_length=1,
        description="projector for images or sound: GGUF file or glob on the nodes; without this key: the only one in "
        "the model's folder, if it belongs to the model; none: no projector",
    )
    image_min_tokens: int | None = Field(
        None, ge=1, le=MOST_IMAGE_TOKENS, description="minimum number of tokens of a picture: smaller ones are enlarged"
    )
    image_max_tokens: int | None = Field(
        None,
        ge=1,
        le=MOST_IMAGE_TOKENS,
        description="maximum number of tokens of a picture, rounded down to a square number: larger ones are made "
        "smaller; none: those of the projector's warm-up image",
    )
    matryoshka_dimensions: VectorSizes | None = Field(
        None,
        description="numbers of dimensions that embeddings may be cut to, for a model trained for it (Matryoshka): a "
        "list, or any; none: they are not cut",
    )
    model_draft: str | None = Field(
        None, min_length=1, description="draft model for speculative decoding: GGUF file or glob on the nodes"
    )

    @field_validator("adapters")
    @classmethod
    def _adapters_have_names(cls, adapters: dict[str, AdapterEntry]) -> dict[str, AdapterEntry]:
        for name in adapters:
            if not NAME.fullmatch(name):
                raise ValueError(f"adapter name {name!r} may hold letters, digits and ._:@/+- only")
        return adapters

    @field_validator("image_max_tokens")
    @classmethod
    def _square(cls, most: int | None) -> int | None:
        """Pictures with this many tokens may be long or square. A square one takes at least as much memory as any."""
        return None if most is None else isqrt(most) ** 2

    @model_validator(mode="after")
    def _least_is_least(self) -> ModelEntry:
        if self.image_min_tokens and self.image_max_tokens and self.image_min_tokens > self.image_max_tokens:
            raise ValueError(
                f"image_min_tokens {self.image_min_tokens} is more than image_max_tokens {self.image_max_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _draft_has_a_use(self) -> ModelEntry:
        if self.spec_type == "draft-simple" and self.model_draft is None:
            raise ValueError("spec_type draft-simple needs a smaller model with the same vocabulary: set model_draft")
        if self.model_draft is not None and self.spec_type in ("ngram-simple", "draft-mtp"):
            raise ValueError(f"spec_type {self.spec_type} uses no model_draft; leave one of them out")
        return self

    @property
    def companion_paths(self) -> tuple[str, ...]:
        """Paths of the files that the entry names besides the model."""
        named = () if self.mmproj in (None, NO_MMPROJ) else (self.mmproj,)
        draft = (self.model_draft,) if self.model_draft is not None and self.spec_type != "none" else ()
        return (*(adapter.path for adapter in self.adapters.values()), *named, *draft)


class Policy(Strict):
    """How the scheduler decides."""

    max_active_models: int | None = Field(
        None, ge=1, description="maximum number of loaded models; 1 is single-active-model mode"
    )
    eviction: Literal["lru", "gdsf"] = Field(
        "lru",
        description="what is evicted first: least recently used (lru), or least often requested and fastest to load "
        "again (gdsf)",
    )
    placement: Literal["pack", "spread"] = Field(
        "pack",
        description="of places with nearly the same cost: the fullest (pack), which keeps big cards free for big "
        "models, or the emptiest (spread)",
    )
    preempt_after_s: float | None = Field(
        None,
        ge=0,
        description="a request that has waited drain_after_s drains busy replicas that serve only lower priorities; "
        "their answers are ended after this many seconds; none: the request waits for its turn",
    )
    prefetch: Literal["read_ahead", "preload"] | None = Field(
        None,
        description="while no request waits: read the most requested models into the page cache (read_ahead), and "
        "load them where GPUs are free (preload); preloaded replicas are evicted first",
    )
    min_residency_s: float = Field(
        5.0, ge=0, description="a replica is not evicted this soon after its load, unless nothing else makes room"
    )
    drain_after_s: float = Field(
        2.0, ge=0, description="after this wait of a request, busy replicas in its way accept no new requests"
    )
    spill_after_s: float = Field(
        30.0, ge=0, description="how long to wait for room on GPUs before host RAM is used, if speeds are not known"
    )
    queue_limit: int = Field(256, ge=1, description="maximum number of waiting requests")
    request_priority_max: int = Field(
        0,
        ge=-10,
        le=10,
        description="highest priority that a request may name; or its model's priority, if that is higher",
    )
    priority_s: float = Field(
        60.0, ge=0, description="one step of priority is worth this many seconds of waiting, so no request starves"
    )
    fair_share_s: float = Field(
        10.0,
        ge=0,
        description="a request is ranked as if it came this much later, for each waiting request of the same API key",
    )
    saved_state_bytes: Bytes = Field(
        4 * GIB,
        description="disk space on each machine for saved states: of conversations whose model was evicted, and of "
        "prefixes that several requests had; 0: nothing is saved",
    )
    deadline_s: float = Field(600.0, gt=0, description="a request that has waited longer is refused")
    lease_ttl_s: float = Field(
        60.0, gt=0, description="a slot is taken back when its lease is not renewed in this time"
    )
    preflight: Literal["unverified", "always", "never"] = Field(
        "unverified",
        description="ask llama.cpp what it would allocate before a first load: only if the formulas were not checked "
        "with this architecture or llama.cpp (unverified), always, or never",
    )
    load_timeout_s: float = Field(900.0, gt=0, description="a load that takes longer has failed")
    release_timeout_s: float = Field(20.0, gt=0, description="how long evicted memory may take to come free")
    max_load_attempts: int = Field(3, ge=1, description="failed loads in a row before a model's requests are refused")
    backoff_s: float = Field(
        5.0, gt=0, description="pause of the model after these failures; doubles each time, 10 minutes at most"
    )
    gpu_claim: float = Field(1.0, ge=0, le=1, description="share of Ray's num_gpus that each GPU actor claims")


class Reserves(Strict):
    """Memory that is never given to models."""

    host_bytes: Bytes = Field(2 * GIB, description="host RAM kept free on each node, beyond what other programs use")
    gpu_bytes: Bytes = Field(
        0, description="memory of each GPU that is not given to models; memory of other programs counts towards it"
    )
    gpus: dict[str, Bytes] = Field(
        default_factory=dict, description="the same for single GPUs, by UUID, label (gpu0) or node/label (box1/gpu0)"
    )
    cuda_overhead_bytes: Bytes = Field(
        600 * MIB,
        description="memory per replica and CUDA GPU that llama.cpp does not report: context, cuBLAS workspace, pool",
    )
    runner_overhead_bytes: Bytes = Field(
        128 * MIB, description="host RAM per replica for the runner's interpreter and libraries"
    )


class Catalogue(Strict):
    """The whole file."""

    model_paths: tuple[str, ...] = Field((), description="directories, files or globs of GGUF models on the nodes")
    models: dict[str, ModelEntry] = Field(default_factory=dict)
    defaults: ModelParams = ModelParams()
    policy: Policy = Policy()
    reserves: Reserves = Reserves()
    server: Server = Server()
    labels: dict[str, dict[str, str]] = Field(
        default_factory=dict, description="labels of machines, by host name; labels that Ray knows need not be repeated"
    )
    virtual_gpus: tuple[Bytes, ...] = Field((), description="loopback devices instead of GPUs, on each node")

    @field_validator("virtual_gpus")
    @classmethod
    def _hold_something(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        for size in sizes:
            if size < MIB:
                raise ValueError(f"a virtual GPU of {size} bytes is too small; write a unit, such as {size}MiB")
        return sizes

    @model_validator(mode="after")
    def _names(self) -> Catalogue:
        for name in self.models:
            for other in (*(self.models[name].near or ()), *(self.models[name].not_with or ())):
                if other == name:
                    raise ValueError(f"model {name} names itself in near or not_with")
            if not NAME.fullmatch(name):
                raise ValueError(f"model name {name!r} may hold letters, digits and ._:@/+- only")
            if name.endswith(":latest"):
                raise ValueError(f"model name {name!r}: leave out :latest, which Ollama's clients add to every name")
        return self

    @field_validator("defaults")
    @classmethod
    def _drafts_are_of_models(cls, defaults: ModelParams) -> ModelParams:
        if defaults.spec_type in ("draft-simple", "draft-mtp"):
            raise ValueError(f"spec_type {defaults.spec_type} is for single models; set it at those that have a draft")
        return defaults

    @model_validator(mode="after")
    def _as_many_replicas_as_allowed(self) -> Catalogue:
        for name, params in {"defaults": self.defaults, **self.models}.items():
            least = self.defaults.min_replicas if params.min_replicas is None else params.min_replicas
            most = self.defaults.max_replicas if params.max_replicas is None else params.max_replicas
            if least is not None and most is not None and least > most:
                raise ValueError(f"{name}: min_replicas {least} is more than max_replicas {most}")
        return self


def parse_catalogue(data: Any, source: str = "catalogue") -> Catalogue:
    """The catalogue in `data` (parsed YAML). Raises Rejected that names every wrong key and suggests the right one."""
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise Rejected(
            f"{source}: a catalogue is a mapping with keys such as models and policy, not {type(data).__name__}"
        )
    try:
        return Catalogue.model_validate(data)
    except ValidationError as invalid:
        raise Rejected(f"{source}: " + "; ".join(_explain(error) for error in invalid.errors())) from invalid


def json_schema() -> str:
    """The catalogue's JSON schema, as it is shipped in `catalogue.schema.json` for editors to check files with."""
    return json.dumps(Catalogue.model_json_schema(), indent=2) + "\n"


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg']}"
    known = sorted(_fields_at(error["loc"][:-1]))
    close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
    return f"unknown key {where}; {hint}"


def _fields_at(location: tuple[Any, ...]) -> set[str]:
    if not location:
        return set(Catalogue.model_fields)
    if "alternatives" in location:
        return set(Alternative.model_fields)
    if location[0] == "models" and location[2:3] == ("adapters",):
        return set(AdapterEntry.model_fields)
    room: dict[str, type[BaseModel]] = {
        "models": ModelEntry, "defaults": ModelParams, "policy": Policy, "reserves": Reserves, "server": Server,
    }  # fmt: skip
    return set(room[str(location[0])].model_fields)


if __name__ == "__main__":
    print(json_schema(), end="")
