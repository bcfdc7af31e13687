"""Prompts that are rendered here, where the server renders them to the same ids.

A server renders the messages of each request anew. Ids that are known are sent instead (`rows`), but only for requests
of a form of which one was rendered by both sides to the same ids.
"""

from collections.abc import Callable

from dspy.lm15 import LM15Error, Request

from dspy_fst.engine.base import Completion
from dspy_fst.engine.chat import Ids, PromptRenderer, plain_texts
from dspy_fst.engine.replies import ReplyReader

Form = tuple[object, ...]
"""Whether there is a system text, then each message's role and number of texts."""


class Prompts:
    """The prompts of one server's model. Thread-safe.

    Args:
        reader: The model's reader, with its tokenizer; without one nothing is rendered here.
    """

    def __init__(self, reader: ReplyReader):
        tokenizer = reader.tokenizer
        self._renderer = None if tokenizer is None else PromptRenderer(tokenizer, reader.traits)
        self._agrees: dict[Form, bool] = {}
        """Form -> whether the server renders it as it is rendered here."""

    def asked(self, request: Request, ask: Callable[[Ids | None], Completion]) -> Completion:
        """The reply to a request.

        Args:
            request: The request.
            ask: Samples the reply; called with the prompt's ids, or with None to have the server render it.
        """
        form = _form(request)
        if form is None or self._renderer is None or self._agrees.get(form) is False:
            return ask(None)
        if form in self._agrees:
            return ask(self._renderer.ids(request))
        completion = ask(None)
        try:
            self._agrees[form] = self._renderer.ids(request) == completion.prompt_ids
        except LM15Error:  # e.g. a template that the server was launched with, and that is not the folder's
            self._agrees[form] = False
        return completion


def _form(request: Request) -> Form | None:
    """The form of a request of plain texts; None for others."""
    texts = plain_texts(request)
    return None if texts is None else (texts[0] is None, *((m.role, len(m.parts)) for m in request.messages))
