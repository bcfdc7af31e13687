"""What changed between two texts: word by word, and between demos whole demos."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

from dspy_fst.formatting.demo_texts import is_demos, readable

Span = tuple[int, int, int, int]
"""Start and end in the words of the old text, then start and end in the words of the new text."""
Opcode = tuple[str, int, int, int, int]
"""As difflib gives it: the operation, then its span."""


@dataclass(frozen=True)
class Piece:
    """A piece of text that both versions share, or that only one of them has."""

    kind: Literal["same", "gone", "new"]
    text: str

    @property
    def words(self) -> str:
        """The text without the space after it."""
        return self.text.rstrip()

    @property
    def space(self) -> str:
        return self.text[len(self.words) :]


def text_diff(component: str, before: str, after: str) -> list[Piece]:
    """What changed of a component: in demos whole demos, in any other text words."""
    if not is_demos(component):
        return word_diff(before, after)
    old, new = (readable(component, text).split("\n") for text in (before, after))
    kept = set(old) & set(new)
    lines = [Piece("same" if line in kept else "new", f"{line}\n") for line in new]
    return [*(Piece("gone", f"{line}\n") for line in old if line not in kept), *lines]


def word_diff(before: str, after: str) -> list[Piece]:
    """The pieces of both texts in reading order: removed text stands before the text that replaced it.

    White space alone is no change.

    >>> word_diff("Sort the list.", "Sort the words.")
    [Piece(kind='same', text='Sort the '), Piece(kind='gone', text='list.'), Piece(kind='new', text='words.')]
    """
    old, new = _words(before), _words(after)
    matcher = SequenceMatcher(None, [word.strip() for word in old], [word.strip() for word in new], autojunk=False)
    pieces = []
    for changed, (i, j, k, n) in _joined(matcher.get_opcodes()):
        if not changed:
            last = max(old[j - 1], new[n - 1], key=len)  # the last word of a text has no space after it
            pieces.append(Piece("same", "".join(new[k : n - 1]) + last))
            continue
        pieces += [Piece("gone", "".join(old[i:j]))] * (j > i) + [Piece("new", "".join(new[k:n]))] * (n > k)
    return pieces


def _joined(opcodes: Sequence[Opcode]) -> list[tuple[bool, Span]]:
    """Changed and unchanged spans in turn. One or two equal words between two longer changes count as changed."""
    stretches: list[tuple[bool, Span]] = []
    sizes = [max(j - i, n - k) for _, i, j, k, n in opcodes]
    for place, (kind, i, j, k, n) in enumerate(opcodes):
        inside = 0 < place < len(opcodes) - 1
        changed = kind != "equal" or (inside and sizes[place] <= min(2, sizes[place - 1] - 1, sizes[place + 1] - 1))
        if stretches and stretches[-1][0] == changed:
            start = stretches.pop()[1]
            stretches.append((changed, (start[0], j, start[2], n)))
        else:
            stretches.append((changed, (i, j, k, n)))
    return stretches


def _words(text: str) -> list[str]:
    """The words, each with the white space that follows it. Leading white space belongs to the first word."""
    return re.findall(r"\s*\S+\s*|\s+", text)
