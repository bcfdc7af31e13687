"""A docstring's examples as blocks of code on the site: mkdocstrings knows them under a heading of their own only."""

import re
from typing import Any

import griffe

EXAMPLES = re.compile(r"(?:^>>> .*\n?(?:^(?!>>> ).+\n?)*)+", re.MULTILINE)
"""Lines that begin with a prompt, and what each is followed by up to an empty line."""


class Doctests(griffe.Extension):
    """Fences the examples, without what is only meant for doctest."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object that is read."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLES.sub(_fenced, obj.docstring.value)


def _fenced(found: re.Match[str]) -> str:
    code = re.sub(r" *# doctest: .*", "", found[0])
    return f"```pycon\n{code.rstrip()}\n```\n"
