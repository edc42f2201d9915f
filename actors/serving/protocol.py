"""What the gateway asks a runner, and what comes back. Plain records: they cross process borders and stay small."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from actors.devices.processes import Process
from actors.endpoint import Endpoint
from scheduler.cluster.replica import Placement
from scheduler.costs.paces import Pace
from scheduler.costs.params import MOST_DRAFTED, ContextParams, DeviceBytes, DeviceKind, HostBytes
from scheduler.entry_parts import VectorSizes
from scheduler.events import FailureKind

FinishReason = Literal["stop", "length"]
"""Of the engine; an answer that calls tools says "tool_calls" to its client instead of "stop"."""


@dataclass(frozen=True, slots=True)
class LoadDevice:
    """A device as the runner must reach it: a CUDA UUID, or a virtual GPU's shared state and limit."""

    device_id: str
    kind: DeviceKind
    required_bytes: int  # what the ledger reserved; less free than that and the runner refuses
    state_path: str = ""
    total_bytes: int = 0


class LoadAdapter(NamedTuple):
    """A LoRA adapter. `scale`: the one that applies where a request names none."""

    name: str
    path: str
    scale: float


class LoadDraft(NamedTuple):
    """What guesses next tokens, where the context's `spec_type` says so. `path`: of a draft model; empty: none.
    `n_max`: tokens of an answer at once; `p_min`: how likely the likeliest token must be to be guessed. `on_device`:
    a draft model lies on the first of the devices; else in host RAM."""

    path: str = ""
    n_max: int = MOST_DRAFTED
    p_min: float = 0.0
    on_device: bool = False


NO_DRAFT = LoadDraft()


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """All that a runner needs to load one replica; nothing is left for llama.cpp to fit by itself."""

    model: str
    path: str
    devices: tuple[LoadDevice, ...]
    n_gpu_layers: int
    tensor_split: tuple[float, ...]
    experts_pattern: str  # of tensor names: these stay in host RAM; empty: none
    context: ContextParams
    n_threads: int  # the most that ever compute on the CPU; 1: a device computes
    host_required_bytes: int
    use_mmap: bool = True
    use_extra_bufts: bool = False
    placement: Placement | None = None  # the scheduler's own record, kept for one that restarts
    preflight: bool = False  # ask llama.cpp first what it would allocate
    chat_template: str = ""  # in place of the file's
    saved_state_bytes: int = 0  # the most that states of conversations take on the node's disk; 0: none are saved
    adapters: tuple[LoadAdapter, ...] = ()  # in the catalogue's order, which requests name them by
    mmproj: str = ""  # the projector's path; empty: none
    mmproj_on_device: bool = False  # whether it lies on the first of the devices; else in host RAM
    draft: LoadDraft = NO_DRAFT
    matryoshka_dimensions: VectorSizes = ()  # that its embeddings may be cut to


@dataclass(frozen=True, slots=True)
class BufferSizes:
    """llama.cpp's own report after loading. `devices` is parallel to `LoadSpec.devices`; kv has recurrent state too."""

    devices: tuple[DeviceBytes, ...]
    host: HostBytes
    n_ctx_per_slot: int


SAMPLERS = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")
"""llama.cpp's samplers in the order that it runs them in (`common_params_sampling`, common.h)."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampler settings: llama.cpp's names (OpenAI's for penalties) and llama.cpp's defaults, which switch most of them
    off. `temperature` 0 is greedy. A window of -1 tokens is the whole context."""

    temperature: float = 0.8
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    typ_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    mirostat: int = 0  # 1 and 2: instead of all other samplers but the penalties of logit_bias and the temperature
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    adaptive_target: float = -1.0
    adaptive_decay: float = 0.9
    min_keep: int = 0
    samplers: tuple[str, ...] = SAMPLERS  # also "adaptive_p" and "infill"
    seed: int | None = None
    logit_bias: Mapping[int, float] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0  # the answer does not end by itself before


def content_of(**parts: object) -> bytes:
    """The content of a request; see `GenerateRequest` and `EmbedRequest`. Parts that are None are left out."""
    return json.dumps(given_of(parts), ensure_ascii=False, separators=(",", ":")).encode()


def given_of(parts: Mapping[str, object]) -> dict[str, object]:
    """Without what is None."""
    return {name: part for name, part in parts.items() if part is not None}


@dataclass(frozen=True, slots=True)
class ReplyForm:
    """How the client wants to read the answer: as OpenAI's `chat.completion`, `text_completion` or `response`, as the
    completion of llama-server's own API, as Ollama's, or as Anthropic's message; whole or streamed. "plain": as it is.

    `created`: seconds since 1970, whole ones where the client reads it.
    """

    form: Literal[
        "chat", "text", "completion", "plain", "ollama-chat", "ollama-generate", "anthropic", "responses",
    ] = "text"  # fmt: skip
    stream: bool = False
    include_usage: bool = False  # in the events
    as_functions: bool = False  # a call of a tool is told as OpenAI's `function_call` of old
    request_id: str = ""
    model: str = ""
    created: float = 0
    settings: str = "{}"  # of the request, as JSON: a `response` tells them again


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """`content` is what the answer is made from, as JSON: {"messages": [...]} (rendered through the model's chat
    template) or {"prompt": a text or token ids} (as it is), never both; and, where the answer must follow one,
    {"json_schema": {...}} (empty: any JSON object) or {"grammar": GBNF}. With messages also, in OpenAI's and
    llama-server's words: tools, tool_choice, parallel_tool_calls, reasoning_format, reasoning_effort,
    chat_template_kwargs, continue_final_message, thinking_budget_tokens. Instead of a prompt there may be several
    ("prompts"), what stands around a gap ({"infill": {...}}, see `infill_prompt`), or a question that needs no model
    ({"examine": {...}}, see `examined`). {"logit_bias": {text: bias}} is for tokens that only the preparer knows.
    The content of a message is a text, or a list of parts: {"type": "text", "text"}, or {"type": "image" or "audio",
    "data": the file in base64}.
    The content may be large, and only the preparer opens it. The runner knows the request by its lease.

    `n`: answers to each prompt. `max_tokens` 0: the prompt is read, and nothing is said. `n_probs`: how many likely
    tokens are told with each token, and how likely all of them are; `echo`: of the prompt's tokens, too.
    `lora`: adapters by number or name, and their scales; all others are switched off. None: the catalogue's scales.
    """

    content: bytes
    lease_id: str = ""
    max_tokens: int | None = None  # None: until end of generation or the context is full
    stop: tuple[str, ...] = ()
    sampling: Sampling = Sampling()
    reply: ReplyForm = ReplyForm()
    source: str = ""  # who asks: an API key's name, or an address
    n: int = 1
    n_probs: int | None = None
    echo: bool = False
    lora: tuple[tuple[int | str, float], ...] | None = None


class Delta(NamedTuple):
    """What a piece of an answer adds to its message: to one of its parts.

    `tool`: the number of a tool call, which `name` and `arguments` (a piece of its JSON) belong to; else None.
    """

    content: str = ""
    reasoning: str = ""
    tool: int | None = None
    name: str = ""
    arguments: str = ""


class Likelihood(NamedTuple):
    """How likely a token was where it came: the natural logarithm of its probability, before any sampler; None where
    nothing came before it. `top`: the likeliest tokens there, as their bytes and logarithms, the likeliest first."""

    token: int
    piece: bytes
    logprob: float | None
    top: tuple[tuple[int, bytes, float], ...] = ()


class Timings(NamedTuple):
    """Seconds from the slot to the first token, and from there to the last. Tokens that were guessed ahead and checked,
    and how many of them were right."""

    prompt_s: float
    answer_s: float
    draft_n: int = 0
    draft_n_accepted: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. The last one has `finish_reason` and the usage counts; earlier ones have text.

    `deltas`: what the text means, in an answer that is parsed; else None, and the text is the content. `likelihoods`:
    of tokens that were not told before, if they were asked for. `stopped_by`: the stop string of the request that ended
    the answer. `index`: of the answer, where a request has several; `left`: how many of these have not ended.
    """

    text: str
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens found in the slot's KV cache
    completion_tokens: int = 0
    reasoning_tokens: int = 0  # of the completion's; 0 where thoughts are not told apart
    pace: Pace | None = None  # how fast it went while no other answer was in the batch
    deltas: tuple[Delta, ...] | None = None
    likelihoods: tuple[Likelihood, ...] = ()
    stopped_by: str = ""
    timings: Timings | None = None
    index: int = 0
    left: int = 0


def deltas_of(chunk: Chunk) -> tuple[Delta, ...]:
    """What a chunk adds to the message, parsed or not."""
    return (Delta(content=chunk.text),) if chunk.deltas is None else chunk.deltas


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """`content` as JSON: {"inputs": texts or lists of token ids}; or, to `rerank`, {"rerank": {"query": text,
    "documents": texts}}. `dimensions`: of the vectors, which are cut there; None: all. `source`: as in
    `GenerateRequest`."""

    content: bytes
    lease_id: str = ""
    source: str = ""
    dimensions: int | None = None
    rerank: bool = False


@dataclass(frozen=True, slots=True)
class EmbedResult:
    """`vectors`: arrays of 4-byte floats, which cross processes as fast as their bytes."""

    vectors: tuple[Sequence[float], ...]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """Why a load did not happen. "refused": live memory was below the reservation, nothing was loaded.

    "underestimated": the pre-flight says that the load would take more than was reserved, namely `buffers`.
    """

    kind: FailureKind
    message: str
    buffers: BufferSizes | None = None


class LoadFailed(Exception):
    """A load that did not happen, inside the runner's process; across processes it travels as its `LoadFailure`."""

    def __init__(self, kind: FailureKind, message: str, buffers: BufferSizes | None = None) -> None:
        super().__init__(message)
        self.failure = LoadFailure(kind, message, buffers)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """A load that worked. `process_started_at_s` (after boot) makes `pid` unambiguous."""

    buffers: BufferSizes
    pid: int
    process_started_at_s: float
    load_s: float


@dataclass(frozen=True, slots=True)
class Introduction:
    """What a runner says of itself before it loads."""

    process: Process
    endpoint: Endpoint


RunnerState = Literal["idle", "loading", "ready", "broken", "closed"]


@dataclass(frozen=True, slots=True)
class RunnerStatus:
    """What a runner says of itself; enough for a restarted scheduler to adopt it again."""

    replica_id: str  # "" and no spec until it was told to load
    spec: LoadSpec | None
    state: RunnerState
    reason: str  # why it is broken, "" otherwise
    report: LoadReport | None
    progress: float  # of the load, 0 to 1
    active_requests: tuple[str, ...]
