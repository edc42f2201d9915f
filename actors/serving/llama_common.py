"""llama.cpp's own chat code: messages into prompts, answers back into messages, JSON schemas into grammars.

It has no C interface. `llama_common.cpp` gives it one, and is built at set-up beside llama_cpp's libraries, with
`sound_files.cpp`, which opens sounds. Time and memory are not limited here, and a hostile template, answer or sound may
end the process. So use it in a preparer only.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp

from scheduler.errors import EngineFailed, Rejected

LIBRARY = "libarriero_common.so"


@cache
def library() -> ctypes.CDLL:
    """The shim, loaded. Raises EngineFailed where set-up did not build it."""
    path = Path(llama_cpp.__file__).parent / "lib" / LIBRARY
    if not path.exists():
        raise EngineFailed(f"{path} is missing: chats need it; run `make setup` (on a node: setup/node)")
    loaded = ctypes.CDLL(str(path))
    text, pointer, error = ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
    size = ctypes.c_size_t
    for name, result, arguments in (
        ("arriero_free", None, [text]),
        ("arriero_templates", pointer, [pointer, ctypes.c_char_p, error]),
        ("arriero_templates_free", None, [pointer]),
        ("arriero_render", text, [pointer, ctypes.c_char_p]),
        ("arriero_parser", pointer, [ctypes.c_char_p, error]),
        ("arriero_parser_free", None, [pointer]),
        ("arriero_parse", text, [pointer, ctypes.c_char_p, size, ctypes.c_bool]),
        ("arriero_grammar", text, [ctypes.c_char_p]),
        ("arriero_take", ctypes.c_bool, [pointer, ctypes.c_int32]),
        ("arriero_sound", ctypes.c_int64, [ctypes.c_char_p, size, ctypes.c_bool, ctypes.c_uint32, pointer, size]),
    ):
        try:
            function = getattr(loaded, name)
        except AttributeError:
            raise EngineFailed(
                f"{path} was built from other sources; run `make setup` (on a node: setup/node)"
            ) from None
        function.restype, function.argtypes = result, arguments
    return loaded


class ChatTemplate:
    """The chat template of a model (a `llama_model *`), or `source` in its place; ChatML where there is none.

    `stops`: texts that end an answer, besides those of a rendered request.

    Raises Rejected for one that cannot be read.
    """

    def __init__(self, model: Any, source: str = "") -> None:
        error = ctypes.c_void_p()
        # A model without a template has no token for the end of a ChatML message: it writes it as text.
        own = bool(source) or llama_cpp.llama_model_chat_template(model, None) is not None
        self.stops: tuple[str, ...] = () if own else ("<|im_end|>",)
        self._made = library().arriero_templates(model, source.encode(), ctypes.byref(error))
        told = _told(error.value)
        if not self._made:
            raise Rejected(f"this model's chat template is broken ({told.get('error')}); send a plain prompt instead")

    def render(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """`request`: messages, reasoning_format, enable_thinking, chat_template_kwargs; and where they are wanted
        tools, tool_choice, parallel_tool_calls, json_schema, continue_final_message.

        Returns the fields of llama.cpp's `common_chat_params`. Raises Rejected when the template refuses the messages.
        """
        told = _told(library().arriero_render(self._made, json.dumps(request).encode()))
        if "error" in told:
            raise Rejected(f"this model's chat template refused the messages: {told['error']}")
        return told

    def close(self) -> None:
        if self._made:
            library().arriero_templates_free(self._made)
            self._made = None


class AnswerParser:
    """One answer, as it grows. `syntax`: format, parser and generation_prompt of the rendered request, and
    reasoning_format, parse_tool_calls, is_continuation. Raises EngineFailed for an invalid one."""

    def __init__(self, syntax: Mapping[str, Any]) -> None:
        error = ctypes.c_void_p()
        self._made = library().arriero_parser(json.dumps(syntax).encode(), ctypes.byref(error))
        told = _told(error.value)
        if not self._made:
            raise EngineFailed(f"the answer's parser cannot be made: {told.get('error')}")

    def feed(self, text: str, *, is_partial: bool) -> list[dict[str, Any]] | None:
        """What the next piece of text adds to the message: reasoning_content, content, or index, name, id and
        arguments of a tool call. None when the text does not have the expected form. `is_partial`: more may come."""
        raw = text.encode()
        told = _told(library().arriero_parse(self._made, raw, len(raw), is_partial))
        return told.get("deltas")

    def close(self) -> None:
        if self._made:
            library().arriero_parser_free(self._made)
            self._made = None


def grammar_of(schema: object) -> str:
    """The grammar (GBNF) of a JSON schema. Raises Rejected where there is none."""
    told = _told(library().arriero_grammar(json.dumps(schema).encode()))
    if "error" in told:
        raise Rejected(f"the JSON schema cannot be made into a grammar: {told['error']}")
    return str(told["grammar"])


def _told(pointer: int | None) -> dict[str, Any]:
    """The JSON at this address, which is freed."""
    if not pointer:
        raise MemoryError
    try:
        told: dict[str, Any] = json.loads(ctypes.string_at(pointer))
        return told
    finally:
        library().arriero_free(pointer)
