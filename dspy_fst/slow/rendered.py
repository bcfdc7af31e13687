"""Checks that two tokenizers render the same prompts.

Every chat template is tried, with and without tools, with a system prompt and with several turns.
"""

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

Message = dict[str, object]
Prompt = list[int] | str
"""Token ids, or the name of the exception that the template raises."""
TOOL: Message = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
QUESTION = "What is  a\nlynx? é 1234"
SYSTEM: Message = {"role": "system", "content": "Be brief."}
USER: Message = {"role": "user", "content": QUESTION}
CALL: Message = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "lynx"}}}
CONVERSATIONS: dict[str, list[Message]] = {
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
    """The first prompt whose token ids differ, with both lengths in tokens; None when every prompt is the same."""
    wanted, rendered = dict(_prompts(base)), dict(_prompts(published))
    for what in [*wanted, *(name for name in rendered if name not in wanted)]:
        if (ours := wanted.get(what)) != (theirs := rendered.get(what)):
            return (
                f"its files make another prompt of {what} than the model that training started from: "
                f"{_summary(theirs)} instead of {_summary(ours)}; save the start's tokenizer again with this "
                "transformers and compare both"
            )
    return None


def _summary(prompt: Prompt | None) -> str:
    if prompt is None:
        return "no prompt"
    return f"an error ({prompt})" if isinstance(prompt, str) else f"{len(prompt)} tokens"


def _prompts(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, Prompt]]:
    """Each conversation in words, and its prompt."""
    special = " ".join(str(token) for token in tokenizer.all_special_tokens)
    for text in (QUESTION, special):
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


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Message] | None, template: str | None
) -> Prompt:
    try:
        encoded = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=template, add_generation_prompt=True, return_dict=True
        )
        return list(encoded["input_ids"])
    except Exception as error:  # a template may refuse a conversation with any exception
        return type(error).__name__
