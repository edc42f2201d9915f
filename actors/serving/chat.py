"""Renders a chat: into its prompt, grammar and stop strings, and the syntax by which the answer is parsed.

llama.cpp's own code does the work (`llama_common`). Here its texts become tokens. Belongs to a preparer's child.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.serving.grammar import TOKEN, WORD, Grammar
from actors.serving.llama_common import ChatTemplate
from actors.serving.thoughts import Thoughts
from actors.serving.vocabulary import Vocabulary
from scheduler.errors import Rejected

REASONING_FORMAT = "deepseek"
"""llama-server's default: what a model thinks is told apart from its answer."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A rendered chat. `syntax`: of its answer, for `llama_common.AnswerParser`; None where the answer is its text.
    `preserved`: special tokens that belong to the text. `thinking`: of `ThinkingBudget`, where there is one."""

    prompt: str
    stops: tuple[str, ...]
    syntax: dict[str, Any] | None
    preserved: tuple[int, ...]
    grammar: Grammar | ThoughtfulGrammar | None = None
    thinking: dict[str, Any] | None = None


def render(template: ChatTemplate, vocabulary: Vocabulary, content: Mapping[str, Any]) -> Chat:
    """`content`: of a `GenerateRequest` with messages. Raises Rejected."""
    request, parse_tool_calls = _request_of(content)
    params = template.render(request)
    spelled = {text: _tokens(vocabulary, text) for text in params["preserved_tokens"]}
    preserved = {text: tokens[0] for text, tokens in spelled.items() if len(tokens) == 1}
    syntax = {name: params[name] for name in ("format", "parser", "generation_prompt")} | {
        "reasoning_format": request["reasoning_format"],
        "parse_tool_calls": parse_tool_calls,
        "is_continuation": "continue_final_message" in request,
    }
    return Chat(
        params["prompt"],
        (*template.stops, *params["additional_stops"]),
        syntax if params["grammar"] or _has_parts(params["parser"]) else None,
        tuple(preserved.values()),
        Grammar(vocabulary, content["grammar"]) if "grammar" in content else _grammar(vocabulary, params, preserved),
        _thinking(vocabulary, params, content.get("thinking_budget_tokens")),
    )


def _thinking(vocabulary: Vocabulary, params: Mapping[str, Any], n_tokens: int | None) -> dict[str, Any] | None:
    """How thoughts begin and end, and what ends them after `n_tokens`; None where nothing limits them."""
    if n_tokens is None or not params["thinking_start_tag"] or not params["thinking_end_tags"]:
        return None
    return {
        "start_tag": params["thinking_start_tag"],
        "end_tags": params["thinking_end_tags"],
        "begun": params["generation_prompt"],
        "n_tokens": n_tokens,
        "closing": _tokens(vocabulary, params["thinking_end_tags"][0]),
    }


def _request_of(content: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """For `ChatTemplate.render`, and whether the answer may call tools."""
    names = (
        "messages", "tools", "tool_choice", "parallel_tool_calls", "json_schema", "continue_final_message",
    )  # fmt: skip
    request = {name: content[name] for name in names if name in content}
    if "json_schema" in request:
        request["json_schema"] = whole_schema(request["json_schema"])
    options = dict(content.get("chat_template_kwargs", {}))
    enable_thinking = options.get("enable_thinking", True) is True
    if (effort := content.get("reasoning_effort")) == "none":
        enable_thinking = False
    elif effort is not None:
        options["reasoning_effort"] = effort
    request |= {
        "chat_template_kwargs": options,
        "enable_thinking": enable_thinking,
        "reasoning_format": content.get("reasoning_format", REASONING_FORMAT),
    }
    return request, bool(request.get("tools")) and request.get("tool_choice") != "none"


def whole_schema(schema: object) -> object:
    """A JSON schema that says what it means: the empty one is any object. Raises Rejected for what is none."""
    if not isinstance(schema, Mapping):
        raise Rejected(f"a JSON schema must be an object, not {type(schema).__name__}")
    return schema or {"type": "object"}


def _has_parts(parser: str) -> bool:
    """Whether an answer can be more than its text: if so, or if it ends before its text does, it must be parsed."""
    rules: Sequence[Mapping[str, Any]] = json.loads(parser)["parsers"] if parser else ()
    return any(rule.get("tag", "content") != "content" or rule.get("delimiters") for rule in rules)


def _grammar(
    vocabulary: Vocabulary, params: Mapping[str, Any], preserved: Mapping[str, int]
) -> Grammar | ThoughtfulGrammar | None:
    if not params["grammar"]:
        return None
    begun: str = params["generation_prompt"]
    if not params["grammar_lazy"]:
        return Grammar(vocabulary, params["grammar"], begun=_begun(vocabulary, begun))
    triggers = []
    for trigger in params["grammar_triggers"]:
        token = preserved.get(trigger["value"]) if trigger["type"] == WORD else None
        triggers.append(trigger if token is None else {"type": TOKEN, "value": "", "token": token})
    grammar = Grammar(vocabulary, params["grammar"], triggers)
    if not params["thinking_start_tag"]:
        return grammar
    thoughts = Thoughts(params["thinking_start_tag"], params["thinking_end_tags"], begun)
    return ThoughtfulGrammar(grammar, vocabulary, thoughts)


def _begun(vocabulary: Vocabulary, text: str) -> list[int]:
    """The tokens of what the template begins the answer with, as common_sampler_init takes them."""
    tokens = _tokens(vocabulary, text) if text else []
    if tokens and vocabulary.piece(tokens[0])[:1].isspace() and not text[0].isspace():
        return tokens[1:]
    return tokens


def _tokens(vocabulary: Vocabulary, text: str) -> list[int]:
    return vocabulary.tokenize(text, add_special=False)


class ThoughtfulGrammar:
    """A grammar with triggers that is not asked while the model thinks: it may think of calling a tool."""

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary, thoughts: Thoughts) -> None:
        self._grammar = grammar
        self._vocabulary = vocabulary
        self._thoughts = thoughts

    def take(self, token: int) -> bool:
        thought = self._thoughts.thinks
        self._thoughts.look(self._vocabulary.piece(token))
        return thought or self._grammar.take(token)

    def allowed(self) -> bytes:
        return self._grammar.allowed()

    def close(self) -> None:
        self._grammar.close()
