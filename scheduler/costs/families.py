"""Architectures by name, in families: what is not in the metadata of a file, because llama.cpp has it in its code.

From src/llama-arch.cpp and src/models/*.cpp of the llama.cpp in llama-cpp-python 0.3.36. docs/architectures.md lists
them for people.
"""

from __future__ import annotations

from dataclasses import dataclass

KNOWN = frozenset(
    """
    llama llama4 llama-embed deci falcon grok gpt2 gptneox mpt baichuan starcoder starcoder2 refact bloom stablelm
    bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert gemma-embedding
    qwen qwen2 qwen2moe qwen2vl qwen3 qwen3moe qwen3next qwen3vl qwen3vlmoe qwen35 qwen35moe
    phi2 phi3 phimoe plamo plamo2 plamo3 codeshell orion internlm2 minicpm minicpm3
    gemma gemma2 gemma3 gemma3n gemma4 mamba mamba2 jamba falcon-h1 xverse command-r cohere2 cohere2moe dbrx
    olmo olmo2 olmoe openelm arctic deepseek deepseek2 deepseek2-ocr deepseek32 glm-dsa chatglm glm4 glm4moe bitnet
    jais jais2 nemotron nemotron_h nemotron_h_moe exaone exaone4 exaone-moe rwkv6 rwkv6qwen2 rwkv7 arwkv7
    granite granitemoe granitehybrid granite_swa plm bailingmoe bailingmoe2 bailingmoe3 dots1 arcee afmoe laguna
    ernie4_5 ernie4_5-moe paddleocr hunyuan-moe hunyuan-dense hunyuan_vl hy_v3 smollm3 gpt-oss lfm2 lfm2moe
    dream llada llada-moe rnd1 smallthinker seed_oss grovemoe apertus minimax-01 minimax-m2 minimax-m3 cogvlm
    pangu-embedded mistral3 mistral4 mimo2 step35 spark2_5 maincoder kimi-linear talkie mellum maple muse-glimmer
    t5 t5encoder chameleon wavtokenizer-dec nanbeige hrm_text graniteswitch qwen3tts pockettts deepseek4 dots3note
    hy_v4 kimi-k3 glm5-next qwen4exp dflash eagle3 gemma4-assistant
    """.split()
)

CACHELESS = frozenset(
    """
    bert jina-bert-v2 jina-bert-v3 nomic-bert nomic-bert-moe neo-bert eurobert modern-bert gemma-embedding
    wavtokenizer-dec dream llada llada-moe rnd1
    """.split()
)
"""No memory at all: `create_memory` returns nullptr."""

ENCODERS = CACHELESS - {"dream", "llada", "llada-moe", "rnd1"} | {"t5encoder", "llama-embed"}
"""They embed texts; they do not write any."""

UNUSABLE = {
    "clip": "it is a projector for images or sound, and comes with a model: give it as mmproj",
    "gptj": "llama.cpp knows the name and has no code for it; convert the model to another architecture",
    "plm": "llama.cpp 0.5.0-dev ends the process over its values, which have another shape than its cache",
}
"""Architectures that llama.cpp lists and cannot run, and what follows."""

NORMS_BY_VARIANCE = frozenset(
    """
    falcon gpt2 gptneox mpt starcoder bert modern-bert nomic-bert nomic-bert-moe jina-bert-v2 jina-bert-v3 bloom
    stablelm phi2 codeshell orion starcoder2 command-r cohere2 dbrx olmo jais jais2 nemotron nemotron_h nemotron_h_moe
    wavtokenizer-dec pockettts
    """.split()
)
"""llama.cpp refuses their files without `layer_norm_epsilon`."""
NORMS_BY_SQUARES = KNOWN - NORMS_BY_VARIANCE - set("qwen2vl cohere2moe rwkv6 rwkv6qwen2 rwkv7 arwkv7 deepseek4".split())
"""And theirs without `layer_norm_rms_epsilon`. Of those left out, it took files without the one and without the other,
or (deepseek4) was not asked."""

COUNTS_TOKEN_TYPES = frozenset("bert nomic-bert nomic-bert-moe jina-bert-v2 jina-bert-v3".split())
"""They have an embedding per type of token, and need to be told how many types there are."""

PREDICTING = frozenset(
    """
    deepseek2 deepseek32 glm-dsa glm4moe qwen3next qwen35 qwen35moe bailingmoe3 nemotron_h_moe step35 mimo2 cohere2moe
    hy_v3 deepseek4
    """.split()
)
"""Whose prediction layers (nextn, MTP) llama.cpp can run in a context of their own; others carry them in vain."""

DRAFTS = frozenset({"dflash", "eagle3", "gemma4-assistant"})
"""They guess ahead for another model, whose context (`ctx_other`) they cannot do without."""

RECURRENT = frozenset("mamba mamba2 rwkv6 rwkv6qwen2 rwkv7 arwkv7".split())
HYBRID_BY_HEADS = frozenset("jamba plamo2 granitehybrid lfm2 lfm2moe kimi-linear bailingmoe3 kimi-k3 glm5-next".split())
HYBRID_BY_INTERVAL = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "qwen4exp": 4, "minimax-01": 8}
NEMOTRON_H = frozenset({"nemotron_h", "nemotron_h_moe"})
MLA = frozenset(
    "deepseek2 mistral4 deepseek32 glm-dsa kimi-linear bailingmoe3 kimi-k3 glm5-next dots3note hy_v4".split()
)
KDA = frozenset({"kimi-linear", "bailingmoe3", "kimi-k3", "glm5-next"})
HYPER_CONNECTED = frozenset({"deepseek4", "qwen4exp"})
"""Several residual streams, all of which are the output embedding."""
GROUPED_SSM = frozenset(
    "mamba2 falcon-h1 granitehybrid nemotron_h nemotron_h_moe plamo2 qwen3next qwen35 qwen35moe qwen4exp".split()
)
SSM = GROUPED_SSM | {"mamba", "jamba"}
SHIFTED = frozenset("rwkv6 rwkv6qwen2 rwkv7 arwkv7".split())
MROPE = frozenset("qwen2vl paddleocr qwen3vl qwen3vlmoe qwen35 qwen35moe qwen3tts qwen4exp".split())
MROPE_IF_SECTIONS = frozenset("glm4 glm4moe hunyuan_vl".split())


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


WINDOWS = {
    "afmoe": Window(4), "cohere2": Window(4), "cohere2moe": Window(4, dense_first=True),
    "deepseek4": Window(0, fixed=True), "dflash": Window(None), "dots3note": Window(None),
    "exaone-moe": Window(4, default=128), "exaone4": Window(4, default=4096), "gemma2": Window(2, default=4096),
    "gemma3": Window(6), "gemma3n": Window(5), "gemma4": Window(None),
    "gemma4-assistant": Window(None), "gemma-embedding": Window(6),
    "granite_swa": Window(None), "laguna": Window(4, dense_first=True),
    "llama4": Window(4, default=8192, forced=8192), "maple": Window(None), "mellum": Window(4),
    "mimo2": Window(None), "modern-bert": Window(3, dense_first=True),
    "muse-glimmer": Window(4), "olmo2": Window(4), "gpt-oss": Window(2), "plamo3": Window(8),
    "smallthinker": Window(4, dense_first=True, forced=4096), "spark2_5": Window(None), "step35": Window(None),
}  # fmt: skip
