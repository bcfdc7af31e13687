"""A prompt that was rendered is known; what tells prompts apart is all that they depend on."""

from dataclasses import replace
from typing import Any

import pytest
from dspy.lm15 import Config, FunctionTool, Message, Request, UnsupportedFeatureError

from dspy_fst.engine import chat
from dspy_fst.engine.chat import PromptRenderer, TemplateTraits
from tests.engine.tiny_qwen import make_tokenizer

REQUEST = Request("m", (Message.user("hi"),), system="be brief", config=Config(max_tokens=4))


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The messages of each conversation that a template rendered."""
    rendered: list[Any] = []
    plain = chat.rendered_ids

    def noted(tokenizer: Any, messages: Any, **options: Any) -> list[int]:
        rendered.append(messages)
        return plain(tokenizer, messages, **options)

    monkeypatch.setattr(chat, "rendered_ids", noted)
    return rendered


@pytest.fixture
def renderer() -> PromptRenderer:
    tokenizer = make_tokenizer()
    return PromptRenderer(tokenizer, TemplateTraits.of(tokenizer))


def test_equal_prompts_are_rendered_once(renderer: PromptRenderer, rendered: list[Any]) -> None:
    first = renderer.ids(REQUEST)
    again = renderer.ids(replace(REQUEST, config=Config(max_tokens=9, temperature=0.5)))
    assert first == again
    assert len(rendered) == 1


def test_prompts_that_differ_anywhere_are_told_apart(renderer: PromptRenderer, rendered: list[Any]) -> None:
    others = [
        *(replace(REQUEST, system="be long"), replace(REQUEST, system=None)),
        replace(REQUEST, messages=(Message.user("ho"),)),
        replace(REQUEST, messages=(Message.user("hi"), Message.assistant("ho"), Message.user("hi"))),
        replace(REQUEST, messages=(Message.user("hi"), Message.user("ho"), Message.user("hi"))),
        replace(REQUEST, messages=(Message.user(["h", "i"]),)),
    ]
    assert len({renderer.ids(request) for request in (REQUEST, *others)}) == len(others) + 1
    for request in (REQUEST, *others):
        renderer.ids(request)
    assert len(rendered) == len(others) + 1


def test_a_request_with_tools_is_rendered_each_time(renderer: PromptRenderer, rendered: list[Any]) -> None:
    for _ in range(2):
        renderer.ids(replace(REQUEST, tools=(FunctionTool("add"),)))
    assert len(rendered) == 2


def test_a_known_prompt_with_other_sampling_is_refused_all_the_same(renderer: PromptRenderer) -> None:
    renderer.ids(REQUEST)
    with pytest.raises(UnsupportedFeatureError, match="not what training scores"):
        renderer.ids(replace(REQUEST, config=Config(top_p=0.5)))


def test_the_oldest_prompts_go_first(
    renderer: PromptRenderer, rendered: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "KEPT", 2)
    for text in ("a", "b", "c", "b", "c", "a"):
        renderer.ids(replace(REQUEST, messages=(Message.user(text),)))
    assert len(rendered) == 4
