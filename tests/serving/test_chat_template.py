"""Messages into prompts, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from actors.serving.prompt import ChatTemplate
from scheduler.errors import Rejected

pytestmark = pytest.mark.llama  # the renderer is llama-cpp-python's

PLAIN = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_the_models_own_template_writes_its_special_tokens() -> None:
    prompt = ChatTemplate(PLAIN, bos_token="<s>", eos_token="</s>").render([user("hello")])
    assert prompt.text == "<s>[user] hello\n"
    assert prompt.stops == ("</s>",)
    assert not prompt.add_special


def test_a_model_without_a_template_is_spoken_to_in_chatml() -> None:
    prompt = ChatTemplate(None, bos_token="<s>", eos_token="</s>").render([user("hello")])
    assert prompt.text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.stops == ("<|im_end|>",)
    assert prompt.add_special


def test_text_parts_are_joined_and_no_content_is_empty() -> None:
    template = ChatTemplate(PLAIN, bos_token="", eos_token="")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    prompt = template.render([user(parts), {"role": "assistant", "content": None}])
    assert prompt.text == "[user] ab\n[assistant] \n"
    assert prompt.stops == ()


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one message"),
        ([{"content": "x"}], "no role"),
        ([user(7)], "not int"),
        ([user([{"type": "image_url", "image_url": {"url": "x"}}])], "'image_url' is not supported"),
        ([user(["x"])], "only text parts"),
    ],
)
def test_refuses_what_is_not_text(messages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        ChatTemplate(PLAIN, bos_token="", eos_token="").render(messages)


def test_a_template_that_raises_says_so_to_the_caller() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", bos_token="", eos_token="")
    with pytest.raises(Rejected, match="roles must alternate"):
        template.render([user("x")])


def test_a_broken_template_only_matters_when_it_is_used() -> None:
    template = ChatTemplate("{% if %}", bos_token="", eos_token="")
    with pytest.raises(Rejected, match="send a plain prompt"):
        template.render([user("x")])
