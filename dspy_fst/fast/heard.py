"""What a proposer of the user's warns of (``warnings.warn``) while it proposes, so that a run can tell it.

A stand-in for a reflection LM reads feedback by its own rules, and nothing shows that it could not read a metric's
sentences: its texts only stay as good as guesses.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heard() -> Iterator[list[str]]:
    """A block whose plain warnings are collected, each text once, and not shown.

    Warnings of another category, and those of installed libraries, go where they would have gone.
    """
    told: dict[str, None] = {}
    others = []
    texts: list[str] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield texts
    finally:
        for warning in caught:
            if warning.category is UserWarning and "site-packages" not in warning.filename:
                told[str(warning.message)] = None
            else:
                others.append(warning)
        texts += told
        for warning in others:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
