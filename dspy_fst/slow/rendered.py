"""Whether two tokenizers make the same prompts: every template, with and without tools, a system prompt and turns."""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is  a\nlynx? é 1234"}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "lynx"}}}
CONVERSATIONS = {
    "one turn": [USER],
    "a system prompt and one turn": [SYSTEM, USER],
    "three turns": [SYSTEM, USER, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "How big?"}],
    "a tool's call and result": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "look_up", "content": "a cat"},
    ],
}


def rendering_fault(base: PreTrainedTokenizerBase, published: PreTrainedTokenizerBase) -> str | None:
    """The first prompt that differs, with both lengths in tokens; None when all are the same ids."""
    ours, theirs = dict(_prompts(base)), dict(_prompts(published))
    for what in [*ours, *(name for name in theirs if name not in ours)]:
        one, other = ours.get(what), theirs.get(what)
        if one != other:
            return (
                f"its files make another prompt of {what} than the model that training started from: {_told(other)} "
                f"instead of {_told(one)}; save the start's tokenizer again with this transformers and compare both"
            )
    return None


def _told(ids: Any) -> str:
    return f"{len(ids)} tokens" if isinstance(ids, list) else "no prompt" if ids is None else f"an error ({ids})"


def _prompts(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, Any]]:
    """What is rendered -> token ids, or the kind of error that the template raises."""
    special = " ".join(str(token) for token in tokenizer.all_special_tokens)
    for text in (USER["content"], special):
        yield f"the text {text[:40]!r}", list(tokenizer(text)["input_ids"])
    templates = tokenizer.chat_template
    names = sorted(templates) if isinstance(templates, dict) else [None]
    if templates is None:
        return
    for name in (None, *names) if names != [None] else names:
        for what, messages in CONVERSATIONS.items():
            for tools in (None, [TOOL]):
                where = f"{what}{' with tools' if tools else ''}{f' in the template {name!r}' if name else ''}"
                yield where, _rendered(tokenizer, messages, tools, name)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Any, tools: Any, template: str | None) -> Any:
    try:
        made = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=template, add_generation_prompt=True, return_dict=True
        )
        return list(made["input_ids"])
    except Exception as error:  # a template refuses what it does not take, in any way
        return type(error).__name__
