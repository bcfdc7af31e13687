"""Collects what a user's proposer warns of (``warnings.warn``), so that the run can report it.

A stand-in for a reflection LM reads feedback by rules of its own. When it cannot read the metric's sentences, nothing
else shows it: its texts are then guesses.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """A block whose plain warnings (UserWarning) are collected instead of shown, each text once; of its threads too.

    Warnings of other categories, and those that installed libraries give, are shown after the block.

    Yields:
        The texts so far.
    """
    passed_on: list[tuple[Warning | str, type[Warning], str, int]] = []
    texts: list[str] = []

    def take(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
    ) -> None:
        if category is not UserWarning or "site-packages" in filename:
            passed_on.append((message, category, filename, lineno))
        elif str(message) not in texts:
            texts.append(str(message))

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = take
            yield texts
    finally:
        for message, category, filename, lineno in passed_on:
            warnings.warn_explicit(str(message), category, filename, lineno)
