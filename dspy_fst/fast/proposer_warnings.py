"""Collects what a user's proposer warns of (``warnings.warn``), so that the run can report it.

A stand-in for a reflection LM reads feedback by rules of its own. When it cannot read the metric's sentences, nothing
else shows it: its texts are then guesses.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """A block whose plain warnings (UserWarning) are collected instead of shown, each text once.

    Warnings of other categories, and those that installed libraries give, are shown after the block.

    Yields:
        A list that is empty inside the block and holds the texts after it.
    """
    collected: dict[str, None] = {}
    passed_on: list[warnings.WarningMessage] = []
    texts: list[str] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield texts
    finally:
        for warning in caught:
            if warning.category is UserWarning and "site-packages" not in warning.filename:
                collected[str(warning.message)] = None
            else:
                passed_on.append(warning)
        texts += collected
        for warning in passed_on:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
