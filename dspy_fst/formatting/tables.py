"""A table that people read: aligned text in a terminal, HTML in a notebook. Knows nothing of runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

SHORT = 60
"""Characters of a text that one line shows (ours)."""
STYLE = "text-align: left; vertical-align: top; white-space: pre-wrap"
"""Of a cell of words: an instruction keeps its lines."""


@dataclass(frozen=True)
class TextTable:
    """Rows under named columns."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    """How many columns, from the left, hold words; the others hold numbers and stand to the right."""
    last_is_words: bool = False
    """Whether the last column holds words, too."""

    @property
    def text(self) -> str:
        """Lines; long words are cut, and stand on one line."""
        cells = [list(self.columns), *([one_line(cell) for cell in row] for row in self.rows)]
        widths = [max(len(row[place]) for row in cells) for place in range(len(self.columns))]
        lines = ["  ".join(self._aligned(row, widths)).rstrip() for row in cells]
        return "\n".join([*([self.title] if self.title else []), *(f"  {line}" for line in lines)])

    @property
    def html(self) -> str:
        """A ``<table>``; every text is escaped and whole."""
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
    """A text on one line, cut at its end.

    >>> one_line("Keep\\n every name.", 12)
    'Keep ever...'
    """
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat if len(flat) <= longest else f"{flat[: longest - 3]}..."
