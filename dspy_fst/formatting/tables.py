"""A table as people read it: aligned text in a terminal, HTML in a notebook."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

SHORT = 60
"""Longest text in a line, in characters (ours)."""
STYLE = "text-align: left; vertical-align: top; white-space: pre-wrap"
"""CSS of a cell that holds words. It keeps the line breaks of an instruction."""


@dataclass(frozen=True)
class TextTable:
    """Rows under named columns."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    """How many columns, from the left, hold words. The others hold numbers and are aligned to the right."""
    last_is_words: bool = False
    """Whether the last column holds words as well."""

    @property
    def text(self) -> str:
        """Aligned lines. Each cell is put on one line, and long texts are cut."""
        cells = [list(self.columns), *([one_line(cell) for cell in row] for row in self.rows)]
        widths = [max(len(row[place]) for row in cells) for place in range(len(self.columns))]
        lines = ["  ".join(self._aligned(row, widths)).rstrip() for row in cells]
        return "\n".join([*([self.title] if self.title else []), *(f"  {line}" for line in lines)])

    @property
    def html(self) -> str:
        """A ``<table>``. Texts are escaped, and never cut."""
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        body = "".join(f"<tr>{''.join(self._cells(row))}</tr>" for row in self.rows)
        caption = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _holds_words(self, place: int) -> bool:
        return place < self.words or (self.last_is_words and place == len(self.columns) - 1)

    def _aligned(self, row: Sequence[str], widths: Sequence[int]) -> list[str]:
        return [
            cell.ljust(width) if self._holds_words(place) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]

    def _cells(self, row: Sequence[str]) -> list[str]:
        return [
            f'<td style="{STYLE}">{escape(cell)}</td>' if self._holds_words(place) else f"<td>{escape(cell)}</td>"
            for place, cell in enumerate(row)
        ]


def one_line(text: str, longest: int = SHORT) -> str:
    """The text on one line, its end cut off where it is too long.

    >>> one_line("Keep\\n every name.", 12)
    'Keep ever...'
    """
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat if len(flat) <= longest else f"{flat[: longest - 3]}..."
