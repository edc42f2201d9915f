"""What the sample models say: short sentences about a pack train, each model's its own.

Random weights alone would babble, and worse, be undecided: of hundreds of random logits the two best are often closer
than the rounding of two backends, so that the same question gives two answers. So the embedding and output matrices
are built, not drawn: a phrase is followed by its successor, far ahead of all else. Only after the prompt, and after
every fourth sentence, the layers in between choose, among the sentences' beginnings. So the answer depends on the whole
prompt and on every layer, and yet rounding changes a text of 50 tokens in less than one of a hundred cases.
The vocabulary is SentencePiece with bytes: it can encode any text.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import gguf
    import numpy as np
    import numpy.typing as npt

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}:{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

_COLUMNS = tuple(
    tuple(phrase.strip() for phrase in column.split("|"))
    for column in (
        "The old llama|A white alpaca|The drover|His brother|The young mare|One grey mule|The last wagon|A tired guide"
        "|The whole train|A stubborn ram|The lead animal|Her daughter|The salt trader|A quiet boy|The blind dog|Nobody",
        "slowly|gladly|often|never|always|at last|without haste|at dawn"
        "|in silence|once more|as usual|with care|by night|on Sundays|in spring|all day",
        "carries|follows|finds|guards|forgets|sells|counts|brings|leaves|wants|moves|loses|watches|hides|ties|weighs",
        "the salt|forty sacks|two blankets|the maize|some rope|the letters|a copper bell|the heavy load"
        "|dried coca|the water skins|new wool|the tent|every coin|a broken saddle|fine cloth|the tools",
        "over the pass|along the river|past the lake|through the snow|down the valley|under the stars|across the plain"
        "|behind the hill|near the mine|below the glacier|beyond the border|up the ravine|by the old bridge"
        "|around the summit|to the market|into the fog",
        "because winter is near.|and asks for nothing.|while the wind sings.|but the road is long."
        "|as the moon rises.|for a handful of silver.|until the fire dies.|and nobody speaks.|since the rain began."
        "|with a bell on its neck.|although it hurts.|before the storm.|and so it goes.|after the feast."
        "|when the river is low.|as its mother did.",
    )
)
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-"
_N_CONTROL = 3
_FIRST_PIECE = _N_CONTROL + 256
_FIRST_PHRASE = _FIRST_PIECE + 1 + len(_LETTERS)
_N_SENTENCES = len(_COLUMNS[0])
N_VOCAB = _FIRST_PHRASE + sum(map(len, _COLUMNS))

_CERTAIN = 14.0  # logit of a phrase after its predecessor; all others are about 0 then
_BEGINNING = 8.0  # logit of each sentence's beginning after a story's end, on top of what the layers say
_STORY = 4  # sentences that follow each other


def add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """Tokens, their scores and the chat template."""
    import gguf

    kinds = gguf.TokenType
    letters = ["▁", *_LETTERS]  # "▁" is SentencePiece's space
    phrases = [" " + phrase for column in _COLUMNS for phrase in column]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *phrases])
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
        + [kinds.BYTE] * 256
        + [kinds.NORMAL] * len(letters)
        + [kinds.USER_DEFINED] * len(phrases)  # found in a prompt as a whole, so that an answer sent back is itself
    )
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def embedding_and_output(
    rng: np.random.Generator, n_embd: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Both matrices, of shape (N_VOCAB, n_embd): random embeddings of spread 1, and output rows that point at them.

    A row of the output is the embedding of the phrase that it follows. Random embeddings are almost orthogonal, so
    that the predecessor gets `_CERTAIN` and others noise of `_CERTAIN` / sqrt(n_embd). Rows of everything that is no
    phrase are zero: control tokens, bytes and letters are understood, never said.
    """
    import numpy as np

    embedding = rng.standard_normal((N_VOCAB, n_embd), dtype=np.float32)
    output = np.zeros_like(embedding)
    columns = [_FIRST_PHRASE + index * _N_SENTENCES + rng.permutation(_N_SENTENCES) for index in range(len(_COLUMNS))]
    beginnings, ends = columns[0], columns[-1]
    last = np.arange(_N_SENTENCES) % _STORY == _STORY - 1
    # The ends of stories share a direction, as does all text that is only read, and the beginnings follow it.
    common = rng.standard_normal(n_embd, dtype=np.float32)
    open_ended = np.concatenate([ends[last], np.arange(_FIRST_PHRASE)])
    embedding[open_ended] = (embedding[open_ended] + common) * np.float32(0.5**0.5)
    output[beginnings] = common + 0.7 * rng.standard_normal((_N_SENTENCES, n_embd), dtype=np.float32)
    output[beginnings] *= 2**0.5 * _BEGINNING / n_embd
    output[np.roll(beginnings, -1)[~last]] += embedding[ends[~last]] * np.float32(_CERTAIN / n_embd)
    for before, after in pairwise(columns):
        output[after] = embedding[before] * np.float32(_CERTAIN / n_embd)
    return embedding, output
