"""What a reranker reads: a query and a document, as llama-server joins them."""

from __future__ import annotations

import llama_cpp

from actors.serving.vocabulary import Vocabulary


def rerank_prompt(vocabulary: Vocabulary, query: str, document: str) -> list[int]:
    """By the model's own template for it, or as [BOS] query [EOS] [SEP] document [EOS], whichever of them it adds."""
    template = llama_cpp.llama_model_chat_template(vocabulary.model, b"rerank")
    if template is not None:
        text = template.decode().replace("{query}", query).replace("{document}", document)
        return vocabulary.tokenize(text, add_special=False)
    pointer = vocabulary.pointer
    eos, sep = llama_cpp.llama_vocab_eos(pointer), llama_cpp.llama_vocab_sep(pointer)
    ends = [eos if eos >= 0 else sep] if llama_cpp.llama_vocab_get_add_eos(pointer) else []
    begins = [llama_cpp.llama_vocab_bos(pointer)] if llama_cpp.llama_vocab_get_add_bos(pointer) else []
    between = [sep] if llama_cpp.llama_vocab_get_add_sep(pointer) else []
    asked, read = (vocabulary.tokenize(text, add_special=False, parse_special=False) for text in (query, document))
    return [*begins, *asked, *ends, *between, *read, *ends]
