"""Checks of a model's chat template, from the tokenizer alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dspy_fst.engine.chat import TemplateTraits
from dspy_fst.errors import briefly
from dspy_fst.model_files.reading import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THOUGHT_MARK = "</think>"


def template_faults(tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    """Faults of the template that would affect every call."""
    if not tokenizer.chat_template:
        yield (
            "its tokenizer has no chat template, as is usual for a base model, so it cannot read chat messages; choose "
            "the instruct model, or set tokenizer.chat_template and save it into the model's folder"
        )
        return
    conversation = [{"role": "user", "content": "x"}]
    try:
        plain = tokenizer.apply_chat_template(conversation, tokenize=False)
        prompted = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompted)["input_ids"]
    except Exception as error:  # a template may raise anything
        yield f"its chat template fails ({briefly(error)}); set tokenizer.chat_template"
        return
    if plain == prompted:
        yield (
            "its chat template adds no generation prompt, so replies would continue the user's turn; "
            "add {% if add_generation_prompt %}... to tokenizer.chat_template"
        )
    if not ids:
        yield "its tokenizer has no vocabulary, as without tokenizer.json; copy or download the model again"


def template_warnings(folder: Path) -> list[str]:
    """What the user should know of the template's effect on a conversation; empty before the download."""
    traits = _traits(folder)
    if traits is None or traits.has_system:
        return []
    fate = "refuses a system message" if traits.system == "refused" else "leaves the system message out without a word"
    return [f"the model's chat template {fate}: DSPy's instruction goes into the first user turn, on every engine"]


def template_kind(folder: Path) -> str | None:
    """Whether the next prompt of a conversation can start with the sampled ids, in words; None before the download."""
    traits = _traits(folder)
    if traits is None:
        return None
    system = "" if traits.has_system else "; no system role: its text goes into the first user turn"
    default = f"; its own system prompt where there is none: {traits.own_system!r}" if traits.own_system else ""
    if not traits.keeps_replies:
        turns = "rewrites earlier turns: each turn of a conversation is trained by itself"
    elif traits.keeps_thoughts:
        turns = "keeps earlier turns: a conversation goes on from the sampled ids"
    else:
        turns = (
            "keeps earlier turns, without their thoughts: a conversation goes on from the sampled ids of plain replies"
        )
    return turns + system + default


def _traits(folder: Path) -> TemplateTraits | None:
    if not folder.is_dir():
        return None
    try:
        tokenizer = read_tokenizer(folder)
    except Exception:  # reported as a fault of the model
        return None
    traits = TemplateTraits.of(tokenizer) if tokenizer.chat_template else None
    thinks = THOUGHT_MARK in str(tokenizer.chat_template)
    return traits if thinks or traits is None else traits.without_thoughts()
