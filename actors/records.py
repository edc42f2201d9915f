"""The management API's wire types: what `/api/v1/*` takes and gives, and what the Python client returns.

Bytes are integers (`*_bytes`), times seconds (`*_s`), devices are named by their label ("gpu0") beside their id.
A reader ignores fields it does not know, so that an older client understands a newer gateway; a request with an
unknown field is refused, so that a misspelt option is never silently without effect. Imports neither Ray nor FastAPI.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_NAME_LENGTH = 512
MAX_TOKENS = 2**31 - 1  # llama.cpp counts them in 32 bits


class Record(BaseModel):
    """What the gateway says. Immutable; unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Ask(BaseModel):
    """What a caller says. Immutable; unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# --- status -----------------------------------------------------------------------------------------------------


class NodeStatus(Record):
    """A machine. `memory_reserved_bytes` of host RAM are booked by replicas."""

    node_id: str
    hostname: str
    address: str
    memory_total_bytes: int
    memory_available_bytes: int
    memory_reserved_bytes: int
    physical_cores: int
    state: str


class GpuStatus(Record):
    """A GPU. `booked_bytes` is what the ledger holds on it, `foreign_bytes` what other programs occupy.

    `utilisation` is 0..1; `reason` says why a GPU cannot be used when `state` is not "ok".
    """

    device_id: str
    node_id: str
    label: str
    product: str
    kind: str
    total_bytes: int
    free_bytes: int
    used_bytes: int
    booked_bytes: int
    foreign_bytes: int
    utilisation: float | None = None
    temperature_c: float | None = None
    state: str
    reason: str = ""


class LayoutShare(Record):
    """The part of a replica on one device; `device` is its label, "host" for host RAM."""

    device: str
    layers: int
    bytes: int


class ProjectorShare(Record):
    """Where the projector of a model is, and the bytes it takes there, which are a part of that device's share.
    `device`: a label, "host" for host RAM. `path`: on that machine."""

    path: str
    device: str
    bytes: int


class ReplicaStatus(Record):
    """One loaded (or loading) copy of a model. `n_ctx` is per slot; `loading` is 0..1 while it loads.

    `reserved_bytes` and `measured_bytes` map device labels ("host" included) to bytes; the latter is empty until
    llama.cpp has reported. `idle_s` is None while a request is served, `expires_in_s` None without an idle time-out.
    """

    replica_id: str
    model: str
    state: str
    node: str
    layout: list[LayoutShare] = Field(default_factory=list)
    projector: ProjectorShare | None = None
    n_gpu_layers: int
    experts_on_host: bool = False
    n_ctx: int
    slots: int
    active: int
    n_threads: int
    reserved_bytes: dict[str, int] = Field(default_factory=dict)
    measured_bytes: dict[str, int] = Field(default_factory=dict)
    pinned: bool = False
    idle_s: float | None = None
    expires_in_s: float | None = None
    loading: float | None = None
    pid: int | None = None


class QueueEntry(Record):
    """A request that waits, and what it waits for."""

    request_id: str
    model: str
    waited_s: float
    reason: str


class Status(Record):
    """Everything at one moment. `events(after=last_notice_seq)` continues from here without a gap."""

    version: str
    uptime_s: float
    mode: str
    nodes: list[NodeStatus] = Field(default_factory=list)
    gpus: list[GpuStatus] = Field(default_factory=list)
    replicas: list[ReplicaStatus] = Field(default_factory=list)
    queue: list[QueueEntry] = Field(default_factory=list)
    last_notice_seq: int = 0


class Health(Record):
    """Readable without an API key, so `reasons` should name neither models nor users. "failing" is HTTP 503."""

    status: Literal["ok", "degraded", "failing"]
    version: str
    uptime_s: float = 0.0
    reasons: list[str] = Field(default_factory=list)


# --- models -----------------------------------------------------------------------------------------------------


class AdapterInfo(Record):
    """A LoRA adapter of a model. `scale`: where a request names no adapters; `path`: on a machine that has it."""

    name: str
    scale: float
    path: str = ""


class ModelInfo(Record):
    """A model of the catalogue. `n_ctx` is the context a slot gets by default; `reason` explains "invalid".

    `adapters` in the order in which requests number them; `mmproj`: path of the projector that is loaded with it;
    `draft`: of the model that guesses its next tokens, or its own path where its prediction layers do.
    `takes`: what it takes besides text; `embeds_only`: its answers are vectors.
    """

    name: str
    state: Literal["available", "invalid", "unknown"]
    path: str = ""
    nodes: list[str] = Field(default_factory=list)
    architecture: str | None = None
    quantization: str | None = None
    size_bytes: int | None = None
    n_ctx_train: int | None = None
    n_ctx: int | None = None
    modified_at_s: float | None = None
    pinned: bool = False
    replicas: list[str] = Field(default_factory=list)
    reason: str = ""
    adapters: list[AdapterInfo] = Field(default_factory=list)
    mmproj: str = ""
    draft: str = ""
    takes: list[Literal["images", "sounds"]] = Field(default_factory=list)
    embeds_only: bool = False


# --- plan -------------------------------------------------------------------------------------------------------


class PlanShare(Record):
    """What a plan puts on one device ("host" for host RAM), and the free bytes there before and after."""

    device: str
    layers: int
    bytes: int
    free_before_bytes: int
    free_after_bytes: int


class PlanDraft(Record):
    """What guesses next tokens for the model: a draft model's path, or the model's own where its prediction layers do.
    `bytes`: the part of the shares that it takes, by device; the weights of prediction layers are the model's."""

    path: str
    bytes: dict[str, int]


class PlanVictim(Record):
    """A replica that the plan would evict; `frees` maps device labels to bytes."""

    replica_id: str
    model: str
    idle_s: float
    frees: dict[str, int] = Field(default_factory=dict)


class RejectedCandidate(Record):
    """A place that was considered and not taken."""

    tier: str
    reason: str


class PlanPace(Record):
    """A predicted speed: `per_s` tokens, or `seconds` of a load. `error` is the mean relative error of such predictions
    so far, null before two measurements; `samples` counts them."""

    per_s: float | None = None
    seconds: float | None = None
    error: float | None = None
    samples: int = 0


class PlanSpeed(Record):
    """How fast the model would be: tokens of an answer, tokens of a prompt, the load. Null where nothing is known."""

    answer: PlanPace | None = None
    prompt: PlanPace | None = None
    load: PlanPace | None = None


class PlanCost(Record):
    """Seconds: until victims are idle, until their memory is back, for the load, for usual requests at the predicted
    speed (null where no speed is known), and what stopping the victims will cost. docs/planning.md has the terms."""

    wait: float
    release: float
    load: float
    service: float | None
    regret: float
    total: float


class PlanOption(Record):
    """A place that could be had now, the chosen one included."""

    tier: str
    node: str
    shares: list[LayoutShare]
    evicts: list[str] = Field(default_factory=list)
    cost_s: PlanCost
    tokens_per_s: float | None = None


class Plan(Record):
    """What a request for `model` would cause now. Nothing is started by asking.

    ready: a replica serves it, or will. free: it fits beside the others. evict: after stopping `victims`.
    wait: only after running requests end. blocked: pinned models or other programs are in the way.
    impossible: never, whatever is evicted; `reasons` has the numbers, `would_fit_if` the smallest changes that help.
    `options` are the best places of each kind that could be had now, in the order of preference; where the replica is
    busy, the one where another could be.
    """

    model: str
    verdict: Literal["ready", "free", "evict", "wait", "blocked", "impossible"]
    tier: str | None = None
    node: str | None = None
    shares: list[PlanShare] = Field(default_factory=list)
    draft: PlanDraft | None = None
    projector: ProjectorShare | None = None
    victims: list[PlanVictim] = Field(default_factory=list)
    n_ctx: int | None = None
    n_threads: int | None = None
    speed: PlanSpeed | None = None
    reasons: list[str] = Field(default_factory=list)
    rejected: list[RejectedCandidate] = Field(default_factory=list)
    cost_s: PlanCost | None = None
    options: list[PlanOption] = Field(default_factory=list)
    would_fit_if: list[str] = Field(default_factory=list)


# --- orders -----------------------------------------------------------------------------------------------------


class LoadRequest(Ask):
    """Load `model` and wait until it is ready; `n_ctx` tokens per slot at least (None: the catalogue's)."""

    model: str = Field(min_length=1, max_length=MAX_NAME_LENGTH)
    n_ctx: int | None = Field(default=None, ge=1, le=MAX_TOKENS)


class UnloadRequest(Ask):
    """Stop every replica of `model`: idle ones at once, busy ones when their requests end."""

    model: str = Field(min_length=1, max_length=MAX_NAME_LENGTH)


class PinRequest(Ask):
    """Pinned: never evicted and never timed out. It does not load the model."""

    model: str = Field(min_length=1, max_length=MAX_NAME_LENGTH)
    pinned: bool = True


class LoadResult(Record):
    """`load_s` is 0 when the model was loaded already."""

    model: str
    replica_id: str
    node: str
    n_ctx: int
    load_s: float
    layout: list[LayoutShare] = Field(default_factory=list)


class UnloadResult(Record):
    """`replicas` were told to stop; empty when none was loaded."""

    model: str
    replicas: list[str] = Field(default_factory=list)


class PinResult(Record):
    model: str
    pinned: bool


class Notice(Record):
    """Something that happened, for people (`message`) and machines (`kind`, `data`).

    `seq` grows by one; `at_s` is the head's wall clock, seconds since 1970.
    """

    seq: int
    at_s: float
    kind: str
    message: str
    model: str | None = None
    replica_id: str | None = None
    data: dict[str, Any] = Field(default_factory=dict)


# --- answers, as the Python client returns them -----------------------------------------------------------------


class Usage(Record):
    """Tokens of one request; `cached_tokens` of the prompt were found in the slot's KV cache, and `reasoning_tokens` of
    the completion are thoughts."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0


class Answer(Record):
    """A finished chat or completion. `reasoning`: what the model thought, apart from its text. `tool_calls`: as in
    OpenAI's API; the reason is "tool_calls" then."""

    id: str
    model: str
    text: str
    finish_reason: Literal["stop", "length", "tool_calls"]
    usage: Usage
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = Field(default_factory=list)


class Embeddings(Record):
    """One vector per input, in order."""

    model: str
    vectors: list[list[float]]
    usage: Usage
