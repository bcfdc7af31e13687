"""From a request to the exact ids of its prompt: rendered by the chat template, or continued from what was sampled.

A conversation that goes on holds the text of its earlier replies. Tokenized again, that text can give other ids than
were sampled, and the next prompt would hold a turn that nobody sampled. `PromptRenderer.continued` keeps the ids.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

from dspy import lm15
from jinja2 import TemplateError

from dspy_fst.engine.chat import chat_messages, chat_options
from dspy_fst.engine.template_traits import TemplateTraits, fitted

Ids = tuple[int, ...]


class PromptRenderer:
    """Renders requests with one tokenizer's chat template. Thread-safe."""

    def __init__(self, tokenizer: Any, traits: TemplateTraits):
        self._tokenizer, self._traits = tokenizer, traits
        self._lock = threading.Lock()  # fast tokenizers refuse concurrent use

    def ids(self, request: lm15.Request) -> Ids:
        """The prompt's ids, as the template gives them.

        Raises:
            dspy.lm15.UnsupportedFeatureError: there is no template, or it refuses the messages.
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
        except TemplateError as error:  # e.g. it wants user and assistant to take turns
            raise lm15.UnsupportedFeatureError(f"the chat template refuses the messages: {error}") from error
        return tuple(rendered["input_ids"])

    def continued(self, request: lm15.Request, said: Sequence[Ids]) -> Ids | None:
        """The prompt's ids, beginning with one of ``said``: the ids of an earlier prompt and of its sampled reply.

        None where the text of the prompt does not begin with theirs (the template or the adapter has written the reply
        in other letters), and where the request asks for what is not rendered here.
        """
        if request.config.extensions or request.config.stop:
            return None
        try:
            rendered = self.ids(request)
        except lm15.LM15Error:
            return None  # the engine says it better
        with self._lock:
            return continued(rendered, said, self._text)

    def _text(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)


def continued(rendered: Ids, said: Sequence[Ids], text_of: Callable[[Sequence[int]], str]) -> Ids | None:
    """``rendered`` with its beginning as it was sampled; its text stays the same. None where no beginning is.

    >>> text_of = lambda ids: "".join({1: "a", 2: "b", 3: "ab", 9: "."}[i] for i in ids)
    >>> continued((3, 9, 1), [(1, 2)], text_of)         # "ab" was sampled as "a", "b"
    (1, 2, 9, 1)
    """
    text = text_of(rendered)
    for ids in sorted(said, key=lambda ids: (-len(ids), ids)):
        if rendered[: len(ids)] == ids:
            return rendered
        begun = text_of(ids)
        if not text.startswith(begun):
            continue
        # The longest beginning of that length: a character of several tokens may read as one before it is whole.
        lengths = range(len(rendered) + 1)
        cut = bisect_right(lengths, len(begun), key=lambda tokens: len(text_of(rendered[:tokens]))) - 1
        if text_of(rendered[:cut]) == begun and text_of(ids + rendered[cut:]) == text:
            return ids + rendered[cut:]
    return None
