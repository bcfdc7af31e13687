"""Replies that nobody sampled: known outputs, written as the chat adapter in force asks for them, as token ids.

The text is the chat adapter's own, and the ids are the policy's tokenizer's. Ids of another model are never taken: the
same numbers would be other words.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import dspy
from dspy import lm15

from dspy_fst.engine.chat import Ids, PromptRenderer, rendered_ids
from dspy_fst.engine.replies import stop_ids
from dspy_fst.rollout.chat_adapters import adapter_in_force
from dspy_fst.rollout.rendering import render, renderer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = ({"role": "user", "content": "qasked"}, {"role": "assistant", "content": "qsaid"})


class ReplyWriter:
    """Writes the prompt of a predictor's call and the reply with given outputs, both as ids.

    Args:
        tokenizer: The policy's.
        folder: The policy's files, which name the tokens that end a reply.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", folder: Path):
        self._tokenizer = tokenizer
        self._renderer: PromptRenderer = renderer_of(tokenizer)
        self._end = end_of_reply(tokenizer, folder)

    def prompt(self, predictor: dspy.Predict, inputs: Mapping[str, object]) -> Ids | None:
        """The ids that the policy reads when the predictor is called so; None if they cannot be rendered."""
        return render(predictor, predictor.signature.instructions, dict(inputs), self._renderer)

    def reply(self, predictor: dspy.Predict, outputs: Mapping[str, object]) -> Ids | None:
        """The ids of a reply with these outputs and of the token that ends it; None if the adapter cannot write it, or
        does not read it back."""
        text = reply_text(predictor.signature, outputs)
        return None if text is None else self.said(text)

    def asked(self, request: lm15.Request) -> Ids | None:
        """The ids that the policy reads of a request; None if the chat template refuses it."""
        try:
            return self._renderer.ids(request)
        except lm15.LM15Error:
            return None

    def said(self, text: str) -> Ids:
        """The ids of a reply with this text and of the token that ends it; templates strip a turn."""
        return (*self._tokenizer.encode(text.rstrip(), add_special_tokens=False), *self._end)


def reply_text(signature: type[dspy.Signature], outputs: Mapping[str, object]) -> str | None:
    """A reply as the chat adapter in force asks for it; None if the adapter cannot write or read it.

    >>> with dspy.context(adapter=dspy.XMLAdapter()):
    ...     reply_text(dspy.Signature("question -> answer"), {"answer": "42"})
    '<answer>\\n42\\n</answer>'
    """
    adapter = adapter_in_force()
    try:
        wanted = {name: outputs[name] for name in signature.output_fields}
        text = adapter.format_assistant_message_content(signature, wanted)
        adapter.parse(signature, text)
    except Exception:  # an adapter may be any code, and an output may be of any kind; callers count these
        return None
    return text.rstrip()  # as templates strip a turn


def end_of_reply(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> Ids:
    """The token with which the chat template ends a reply, of those that end one for the engine; else the tokenizer's.

    A model that is not taught to end its replies goes on to ``max_tokens``.
    """
    ends = stop_ids(folder, tokenizer)
    try:
        turn: Sequence[int] = rendered_ids(tokenizer, PROBE)
    except Exception:  # a template may raise anything
        turn = ()
    last = next((token for token in reversed(turn) if token in ends), tokenizer.eos_token_id)
    return (last,) if isinstance(last, int) else ()
