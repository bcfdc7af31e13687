"""The exact token ids of a request's prompt: rendered by the chat template, or continued from sampled ids.

The prompt of a later turn holds the text of earlier replies. Tokenizing that text again can give other ids than were
sampled, and the prompt would then hold a turn that was never sampled. `PromptRenderer.continued` keeps the sampled ids.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dspy import lm15
from jinja2 import TemplateError

from dspy_fst.engine.chat import chat_messages, chat_options
from dspy_fst.engine.template_traits import TemplateTraits, fitted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]


class PromptRenderer:
    """Renders requests with one tokenizer's chat template. Thread-safe."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", traits: TemplateTraits):
        self._tokenizer, self._traits = tokenizer, traits
        self._lock = threading.Lock()  # fast tokenizers refuse concurrent use

    def ids(self, request: lm15.Request) -> Ids:
        """The prompt's ids, as the template renders them.

        Raises:
            dspy.lm15.UnsupportedFeatureError: the tokenizer has no template, or the template refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise lm15.UnsupportedFeatureError(
                "the model's tokenizer has no chat template, as a base model's: it cannot be asked in messages; choose "
                "the instruct model, or set tokenizer.chat_template and save it into the model's folder"
            )
        request = fitted(request, self._traits)
        messages, options = chat_messages(request), chat_options(request)
        try:
            with self._lock:
                rendered = self._tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_dict=True, **options
                )
        except TemplateError as error:  # e.g. user and assistant must alternate
            raise lm15.UnsupportedFeatureError(f"the chat template refuses the messages: {error}") from error
        return tuple(rendered["input_ids"])

    def continued(self, request: lm15.Request, earlier: Sequence[Ids]) -> Ids | None:
        """The prompt's ids, beginning with one of ``earlier``.

        Args:
            request: The request.
            earlier: Ids of earlier prompts, each followed by its sampled reply.

        Returns:
            None if the prompt's text begins with none of their texts (the template or the adapter rewrote the reply),
            or if the request asks for something that is not rendered here.
        """
        if request.config.extensions or request.config.stop:
            return None
        try:
            rendered = self.ids(request)
        except lm15.LM15Error:
            return None  # the engine raises the same error when it renders the request
        with self._lock:
            return continued(rendered, earlier, self._text)

    def _text(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)


def continued(rendered: Ids, earlier: Sequence[Ids], text_of: Callable[[Sequence[int]], str]) -> Ids | None:
    """``rendered`` with its beginning replaced by the sampled ids of the same text; None if no beginning matches.

    >>> text_of = lambda ids: "".join({1: "a", 2: "b", 3: "ab", 9: "."}[i] for i in ids)
    >>> continued((3, 9, 1), [(1, 2)], text_of)         # "ab" was sampled as "a", "b"
    (1, 2, 9, 1)
    """
    text = text_of(rendered)
    for ids in sorted(earlier, key=lambda ids: (-len(ids), ids)):
        if rendered[: len(ids)] == ids:
            return rendered
        beginning = text_of(ids)
        if not text.startswith(beginning):
            continue
        # The most tokens with a text of that length: part of a multi-token character may already decode to a character.
        lengths = range(len(rendered) + 1)
        cut = bisect_right(lengths, len(beginning), key=lambda tokens: len(text_of(rendered[:tokens]))) - 1
        if text_of(rendered[:cut]) == beginning and text_of(ids + rendered[cut:]) == text:
            return ids + rendered[cut:]
    return None
