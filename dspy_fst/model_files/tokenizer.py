"""What a tokenizer is asked, with one type for each answer: transformers' own methods return one of several.

In: a transformers tokenizer. Out: text, or token ids. Nothing is decided here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def decoded(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], **options: bool) -> str:
    """The text of one sequence of ids.

    Args:
        options: Further arguments of ``decode``, e.g. ``skip_special_tokens``.
    """
    decode: Callable[..., object] = tokenizer.decode
    return str(decode(ids, **options))


def rendered_ids(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, object]], **options: object
) -> list[int]:
    """The ids of a conversation, as the tokenizer's chat template writes it.

    Args:
        options: Further arguments of ``apply_chat_template``, e.g. ``tools``.

    Raises:
        Exception: whatever the template raises on messages that it refuses.
    """
    render: Callable[..., object] = tokenizer.apply_chat_template
    rendered = render(messages, return_dict=True, **options)
    assert isinstance(rendered, Mapping), "return_dict asks for a BatchEncoding"
    return list(rendered["input_ids"])
