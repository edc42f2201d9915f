"""Architectures by name, one row each: what is not in the metadata of a file, because llama.cpp has it in its code.

From src/llama-arch.cpp and src/models/*.cpp of llama.cpp. A row says what an architecture has that others do not; what
it leaves out is as `Row` has it. Which releases of llama-cpp-python the rows were compared with, and how each came out
of it, is in `checked`; docs/architectures.md lists that for people.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal[
    "decoder", "encoder", "diffusion", "by heads", "by width", "by interval", "both", "recurrent", "draft", "none"
]
"""How layers remember.

decoder: all attend to a cache. encoder, diffusion: they attend to the batch alone; encoders embed texts and write none.
by heads: layers without key heads carry a recurrent state, the others attend. by width: those that have no feed-forward
width either. by interval: all but each n-th. both: every layer does both. recurrent: no layer attends. draft: it
guesses ahead for another model, whose context (`ctx_other`) it cannot do without. none: there is no code for it.
"""


@dataclass(frozen=True, slots=True)
class Window:
    """How an architecture declares its sliding window: default period of full layers, and where the size comes from."""

    period: int | None
    """Every n-th layer is full unless the file says otherwise; None: the file must carry the list of layers."""
    dense_first: bool = False
    default: int = 0
    """Window where the file gives none; 0: then there are no window layers at all."""
    forced: int = 0
    """Window whatever the file says."""
    fixed: bool = False
    """The period holds whatever the file says."""


@dataclass(frozen=True, slots=True)
class Row:
    """What llama.cpp's code says about one architecture."""

    name: str
    family: Family = "decoder"
    refused: str = ""
    """Why a model of it cannot be run, and what follows."""

    # ------------------------------------------------------------------ what is read from a file
    window: Window | None = None
    predicts: bool = False
    """llama.cpp can run its prediction layers (nextn, MTP) in a context of their own; others carry them in vain."""
    chains: bool = False
    """llama.cpp runs several prediction layers one after the other; of others it runs one, or ends the process."""
    latent: bool = False
    """Keys and values may be cached as one latent row (MLA)."""
    state: Literal["", "ssm", "grouped ssm", "kda", "shift", "convolution", "decay"] = ""
    """What its recurrent layers carry."""
    copies_states: bool = False
    """llama.cpp can keep copies of its recurrent states, one for each of the last tokens
    (`llm_arch_supports_rs_rollback`)."""
    interval: int = 0
    """Every n-th layer attends, unless the file says otherwise."""
    idle_cache: bool = False
    """An encoder that has a cache all the same, and attends to nothing but the batch."""
    norms: Literal["squares", "variance", "either"] = "squares"
    """llama.cpp refuses files without `layer_norm_rms_epsilon` (squares) or `layer_norm_epsilon` (variance). either: it
    took files without the one and without the other, or (deepseek4) was not asked."""
    token_types: bool = False
    """It has an embedding per type of token, and needs to be told how many types there are."""
    positions: Literal["one", "four", "four if told"] = "one"
    """Per token; four with multi-section RoPE. if told: where the file has sections."""
    streams_out: bool = False
    """It has several residual streams, all of which are the output embedding."""

    # ------------------------------------------------------------------ weights
    headless: bool = False
    """Without output.weight it has no output matrix; all others use the token embedding a second time."""
    copied_on_host: bool = False
    """It asks for the output matrix before the token embedding, and so gets both, though both lie on the host."""
    lazy: bool = False
    """Very large embeddings per layer are mapped, and not loaded."""
    kept: str = ""
    """Pattern of tensors of prediction layers that llama.cpp loads although it does not use them: created without
    TENSOR_SKIP."""

    # ------------------------------------------------------------------ the graph, drawn
    template: str = ""
    """Who draws its graph (`graph.templates`); empty: nobody, its compute buffers are bounded."""
    settles: int = 0
    """Results leave the same holes after every so many like layers, so that a few stand for a long row; 0: they do not,
    or the number of a layer matters."""
    grows: bool = False
    """Its compute buffers grow while it serves, as more of the cache is in use."""
    gathers: bool = False
    """A single token makes copies of what it attends to, and a large batch does not."""
    alone_too: bool = False
    """It is reserved with all tokens in one sequence as well, which makes for larger inputs
    (`[TAG_RESERVE_DIAG_DECAY]`)."""
    plain_output: bool = False
    """Its output matrix is multiplied by as it is, without its scale or adapters."""
    scaled: tuple[Literal["dense", "shared", "experts"], ...] = ()
    """Feed-forward blocks that multiply by the scale that comes with a matrix (NVFP4); others leave it out."""

    # ------------------------------------------------------------------ the graph, bounded
    leaks: bool = False
    """In some layouts the bound misses a part, which nobody has found yet. It is drawn wherever that matters; where its
    template does not hold, llama.cpp has to be asked."""
    waiting: int = 0
    """Activations that wait besides the residual stream: where attention and feed-forward block read the same one."""
    convolved: int = 0
    """Activations that a convolution over time has unfolded before it multiplies."""
    logits_alive: int = 1
    """How often logits are alive at once; more than once where some of them are taken out again."""
    above_masks: bool = False
    """The last result lies above the freed masks."""
    always_scores: bool = False
    """Scores are materialised even with flash attention."""
    bucketed: bool = False
    """It adds a bias by distance to the scores, the same for all layers."""
    lightning: bool = False
    """The heads of its indexer are summed up within one step (`ggml_lightning_indexer`)."""
    index_inputs: float = 0
    """Floats per cell and token of the masks over pooled or compressed keys."""
    scaled_by_position: bool = False
    """It may scale attention by position: one more float per token."""
    busy: bool = False
    """Its graph has a budget of nodes per token."""

    @property
    def is_known(self) -> bool:
        """llama.cpp has code for it, and these rules were made from that."""
        return self.family != "none"

    @property
    def has_cache(self) -> bool:
        """False: no memory at all, `create_memory` returns nullptr."""
        return self.family not in ("encoder", "diffusion") or self.idle_cache


ROWS = {row.name: row for row in (
    # Each layer attends to a cache.
    Row("afmoe", window=Window(4)),
    Row("apertus"),
    Row("arcee"),
    Row("arctic"),
    Row("baichuan"),
    Row("bailingmoe"),
    Row("bailingmoe2", template="dots1", settles=2),
    Row("bitnet", headless=True),
    Row("bloom", norms="variance"),
    Row("chameleon", template="chameleon", logits_alive=3),
    Row("chatglm"),
    Row("codeshell", norms="variance"),
    Row("cogvlm"),
    Row("cohere2", template="cohere2", settles=2, window=Window(4), norms="variance", scaled=("dense",), waiting=1),
    Row("cohere2moe", window=Window(4, dense_first=True), predicts=True, norms="either", waiting=2,
        kept=r"nextn\.(embed_tokens|shared_head)"),
    Row("command-r", template="command-r", settles=2, norms="variance", waiting=1),
    Row("dbrx", norms="variance"),
    Row("deci"),
    Row("deepseek"),
    Row("deepseek2", template="deepseek2", predicts=True, latent=True, plain_output=True, leaks=True,
        scaled_by_position=True),
    Row("deepseek2-ocr"),
    Row("deepseek32", template="sparse", predicts=True, latent=True, plain_output=True,
        scaled=("dense", "shared", "experts"), lightning=True, kept=r"exp_probs_b"),
    Row("deepseek4", template="deepseek4", window=Window(0, fixed=True), predicts=True, norms="either",
        streams_out=True, lightning=True, index_inputs=1.5, busy=True),
    Row("dots1", template="dots1", settles=2),
    Row("dots3note", template="sparse", window=Window(None), latent=True, plain_output=True,
        scaled=("dense", "shared", "experts"), lightning=True),
    Row("ernie4_5", template="llama", settles=2),
    Row("ernie4_5-moe", template="llama", settles=2),
    Row("exaone"),
    Row("exaone-moe", window=Window(4, default=128)),
    Row("exaone4", template="exaone4", settles=2, window=Window(4, default=4096)),
    Row("falcon", norms="variance", waiting=1),
    Row("gemma", template="gemma", settles=2),
    Row("gemma2", template="gemma2", settles=2, window=Window(2, default=4096)),
    Row("gemma3", template="gemma3", settles=2, window=Window(6)),
    Row("gemma3n", template="gemma3n", window=Window(5), copied_on_host=True),
    Row("gemma4", template="gemma4", window=Window(None), scaled=("dense", "experts"), copied_on_host=True, lazy=True),
    Row("glm-dsa", template="sparse", predicts=True, latent=True, plain_output=True,
        scaled=("dense", "shared", "experts"), lightning=True, kept=r"exp_probs_b"),
    Row("glm4", template="glm4", settles=2, positions="four if told"),
    Row("glm4moe", template="glm4moe", settles=2, predicts=True, positions="four if told"),
    Row("gpt-oss", template="gpt-oss", settles=2, window=Window(2)),
    Row("gpt2", norms="variance"),
    Row("gptneox", norms="variance", waiting=1),
    Row("granite", template="llama", settles=2),
    Row("granite_swa", window=Window(None), above_masks=True),
    Row("granitemoe", template="llama", settles=2),
    Row("graniteswitch"),
    Row("grok", always_scores=True),
    Row("grovemoe"),
    Row("hrm_text", template="hrm_text"),
    Row("hunyuan-dense"),
    Row("hunyuan-moe", template="hunyuan-moe", settles=2),
    Row("hunyuan_vl", positions="four if told"),
    Row("hy_v3", predicts=True, chains=True, kept=r"ffn_(?!norm)|exp_probs_b|nextn\.(embed_tokens|shared_head)"),
    Row("hy_v4", template="hy_v4", latent=True, lightning=True, busy=True),
    Row("internlm2"),
    Row("jais", norms="variance"),
    Row("jais2", norms="variance"),
    Row("laguna", window=Window(4, dense_first=True)),
    Row("llama", template="llama", settles=2, scaled=("dense", "experts")),
    Row("llama4", window=Window(4, default=8192, forced=8192), scaled_by_position=True),
    Row("maincoder"),
    Row("maple", window=Window(None)),
    Row("mellum", window=Window(4)),
    Row("mimo2", window=Window(None), predicts=True, chains=True),
    Row("minicpm"),
    Row("minicpm3"),
    Row("minimax-m2"),
    Row("minimax-m3", template="minimax-m3", grows=True, gathers=True, busy=True),
    Row("mistral3", template="llama", settles=2, scaled=("dense", "experts"), scaled_by_position=True),
    Row("mistral4", latent=True, scaled_by_position=True),
    Row("mpt", norms="variance"),
    Row("muse-glimmer", window=Window(4)),
    Row("nanbeige", template="nanbeige", scaled=("dense",), busy=True),
    Row("nemotron", norms="variance"),
    Row("olmo", norms="variance"),
    Row("olmo2", template="olmo2", settles=2, window=Window(4)),
    Row("olmoe", template="olmoe", settles=2),
    Row("openelm"),
    Row("orion", norms="variance"),
    Row("paddleocr", positions="four"),
    Row("pangu-embedded"),
    Row("phi2", template="phi2", settles=6, norms="variance", waiting=1),
    Row("phi3", template="phi3", settles=6, above_masks=True),
    Row("phimoe"),
    Row("plamo", waiting=1, above_masks=True),
    Row("plamo3", window=Window(8), above_masks=True),
    Row("plm", refused="llama.cpp 0.5.0-dev ends the process: its values have another shape than its cache"),
    Row("pockettts", norms="variance"),
    Row("qwen"),
    Row("qwen2", template="llama", settles=2),
    Row("qwen2moe", template="qwen2moe", settles=2),
    Row("qwen2vl", norms="either", positions="four"),
    Row("qwen3", template="llama", settles=2, scaled=("dense",)),
    Row("qwen3moe", template="llama", settles=2, scaled=("experts",)),
    Row("qwen3tts", template="qwen3tts", positions="four", logits_alive=3),
    Row("qwen3vl", positions="four"),
    Row("qwen3vlmoe", positions="four"),
    Row("refact"),
    Row("seed_oss", template="seed_oss", settles=2),
    Row("smallthinker", window=Window(4, dense_first=True, forced=4096)),
    Row("smollm3", template="smollm3"),
    Row("spark2_5", window=Window(None)),
    Row("stablelm", template="stablelm", settles=2, norms="variance", waiting=1),
    Row("starcoder", norms="variance"),
    Row("starcoder2", template="starcoder2", settles=2, norms="variance"),
    Row("step35", window=Window(None), predicts=True, chains=True, waiting=2,
        kept=r"ffn_(?!norm)|exp_probs_b|attn_(gate|q_norm|k_norm)|nextn\.(embed_tokens|shared_head)"),
    Row("t5", template="t5", bucketed=True, always_scores=True),
    Row("talkie", waiting=3, above_masks=True),
    Row("xverse"),

    # They embed texts.
    Row("bert", family="encoder", template="bert", norms="variance", token_types=True, headless=True),
    Row("eurobert", family="encoder", headless=True),
    Row("gemma-embedding", family="encoder", template="gemma-embedding", window=Window(6)),
    Row("jina-bert-v2", family="encoder", template="bert", norms="variance", token_types=True, headless=True),
    Row("jina-bert-v3", family="encoder", template="bert", norms="variance", token_types=True, headless=True),
    Row("llama-embed", family="encoder", idle_cache=True),
    Row("modern-bert", family="encoder", template="modern-bert", window=Window(3, dense_first=True), norms="variance",
        headless=True),
    Row("neo-bert", family="encoder", headless=True),
    Row("nomic-bert", family="encoder", template="bert", norms="variance", token_types=True, headless=True),
    Row("nomic-bert-moe", family="encoder", template="bert", norms="variance", token_types=True, headless=True),
    Row("t5encoder", family="encoder", template="t5encoder", idle_cache=True, bucketed=True, always_scores=True),
    Row("wavtokenizer-dec", family="encoder", template="wavtokenizer", norms="variance", convolved=20, headless=True),

    # They write texts all at once.
    Row("dream", family="diffusion"),
    Row("llada", family="diffusion"),
    Row("llada-moe", family="diffusion"),
    Row("rnd1", family="diffusion"),

    # Layers that attend and layers that carry a state.
    Row("bailingmoe3", family="by heads", predicts=True, latent=True, state="kda", copies_states=True, busy=True),
    Row("glm5-next", family="by heads", template="glm5-next", latent=True, state="kda", copies_states=True,
        plain_output=True, lightning=True, index_inputs=2),
    Row("granitehybrid", family="by heads", template="hybrid", state="grouped ssm"),
    Row("jamba", family="by heads", template="hybrid", state="ssm", above_masks=True),
    Row("kimi-k3", family="by heads", latent=True, state="kda", copies_states=True),
    Row("kimi-linear", family="by heads", latent=True, state="kda", busy=True),
    Row("lfm2", family="by heads", template="hybrid", state="convolution", copies_states=True, above_masks=True),
    Row("lfm2moe", family="by heads", template="hybrid", state="convolution", copies_states=True),
    Row("plamo2", family="by heads", template="plamo2", state="grouped ssm", above_masks=True),
    Row("nemotron_h", family="by width", template="nemotron_h", state="grouped ssm", copies_states=True,
        norms="variance", scaled=("dense", "shared", "experts"), leaks=True, waiting=12),
    Row("nemotron_h_moe", family="by width", template="nemotron_h", predicts=True, state="grouped ssm",
        copies_states=True, norms="variance", scaled=("dense", "shared", "experts"), leaks=True, waiting=12),
    Row("minimax-01", family="by interval", template="minimax-01", alone_too=True, state="decay", interval=8, waiting=6,
        busy=True),
    Row("qwen35", family="by interval", template="qwen3next", predicts=True, state="grouped ssm", copies_states=True,
        interval=4, positions="four", scaled=("dense",), busy=True),
    Row("qwen35moe", family="by interval", template="qwen3next", predicts=True, state="grouped ssm", copies_states=True,
        interval=4, positions="four", scaled=("shared", "experts"), busy=True),
    Row("qwen3next", family="by interval", template="qwen3next", predicts=True, state="grouped ssm", interval=4,
        scaled=("shared", "experts"), busy=True),
    Row("qwen4exp", family="by interval", template="qwen4exp", state="grouped ssm", copies_states=True, interval=4,
        positions="four", streams_out=True, scaled=("shared", "experts"), busy=True, lazy=True),
    Row("falcon-h1", family="both", template="falcon-h1", state="grouped ssm"),

    # No layer attends.
    Row("arwkv7", family="recurrent", template="rwkv-hybrid", state="shift", norms="either"),
    Row("mamba", family="recurrent", template="mamba", state="ssm", leaks=True),
    Row("mamba2", family="recurrent", template="mamba", state="grouped ssm", leaks=True),
    Row("rwkv6", family="recurrent", template="rwkv", state="shift", norms="either"),
    Row("rwkv6qwen2", family="recurrent", template="rwkv-hybrid", state="shift", norms="either"),
    Row("rwkv7", family="recurrent", template="rwkv", state="shift", norms="either"),

    # They guess ahead for another model.
    Row("dflash", family="draft", window=Window(None)),
    Row("eagle3", family="draft"),
    Row("gemma4-assistant", family="draft", window=Window(None)),

    # llama.cpp has no code for these.
    Row("clip", family="none", norms="either",
        refused="it is a projector for images or sound, and comes with a model: give it as mmproj"),
    Row("gptj", family="none", norms="either",
        refused="llama.cpp knows the name and has no code for it; convert the model to another architecture"),
)}  # fmt: skip

KNOWN = frozenset(name for name, row in ROWS.items() if row.is_known)

_UNKNOWN = Row("", family="none", norms="either")


def row_of(name: str) -> Row:
    """The row of an architecture; for a name that nobody has heard of, one that `is_known` is false of."""
    return ROWS.get(name, _UNKNOWN)
