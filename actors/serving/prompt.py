"""Messages into a prompt, through the chat template that the model file carries.

The template (GGUF key `tokenizer.chat_template`) is Jinja, rendered in a sandbox as Hugging Face and llama-cpp-python
do it; such a template writes its own beginning-of-sequence token. A model without one is spoken to in ChatML, and the
tokenizer adds the special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from scheduler.errors import Rejected

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"  # as an expression, because Jinja drops a newline that ends a template
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt. `add_special`: the tokenizer has still to add its special tokens."""

    text: str
    stops: tuple[str, ...]
    add_special: bool


class ChatTemplate:
    """One model's chat template. A template that does not compile is reported when it is first needed."""

    def __init__(self, template: str | None, *, bos_token: str, eos_token: str) -> None:
        self._own = template is not None
        self._stops = tuple(filter(None, (eos_token,))) if self._own else ("<|im_end|>",)
        self._broken = ""
        self._formatter: Jinja2ChatFormatter | None = None
        try:
            self._formatter = Jinja2ChatFormatter(template or _CHATML, eos_token=eos_token, bos_token=bos_token)
        except MemoryError:  # a limit of this process, which has to end
            raise
        except Exception as error:  # any error of Jinja's compiler, whatever its type
            self._broken = f"{type(error).__name__}: {error}"

    def render(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        """The prompt that ends where the assistant is to begin.

        Raises Rejected when a message is not text or the template refuses the conversation.
        """
        if self._formatter is None:
            raise Rejected(f"this model's chat template is broken ({self._broken}); send a plain prompt instead")
        flat: Any = [_flatten(message, index) for index, message in enumerate(messages)]
        if not flat:
            raise Rejected("a chat needs at least one message")
        try:
            text = self._formatter(messages=flat).prompt
        except MemoryError:
            raise
        except Exception as error:  # templates raise their own errors on purpose, for example on unknown roles
            raise Rejected(f"this model's chat template refused the messages: {error}") from error
        return Prompt(text, self._stops, add_special=not self._own)


def _flatten(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """`message` with its content as one text: chat templates expect a string."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise Rejected(f"message {index} has no role")
    if content is None:
        content = ""
    elif isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part_text(part, index) for part in content)
    elif not isinstance(content, str):
        raise Rejected(f"message {index}: content must be a text or a list of parts, not {type(content).__name__}")
    return {**message, "content": content}


def _part_text(part: object, index: int) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
        raise Rejected(f"message {index}: a content part of type {kind!r} is not supported; only text parts are")
    return str(part["text"])
