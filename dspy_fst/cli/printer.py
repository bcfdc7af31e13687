"""Tables on stdout. They wrap at the width of a terminal, and are never cut in a file or a pipe."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 10_000
"""Width in characters of an output that is not a terminal: a file or a pipe has no edge to wrap at."""


class Printer:
    """Writes headings, sentences and tables to stdout."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        if not self._console.is_terminal:
            self._console = Console(highlight=False, markup=False, no_color=True, width=PLAIN_WIDTH)

    def heading(self, text: str) -> None:
        self._console.print()
        self._console.print(Text(shown(text), style="bold"))

    def line(self, text: str) -> None:
        self._console.print(Text(shown(text)))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> None:
        """A table. The first ``words`` columns hold words, the others numbers. Cells wrap and are never cut."""
        grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for place, column in enumerate(columns):
            grid.add_column(column, justify="left" if place < words else "right", overflow="fold")
        for row in rows:
            grid.add_row(*(Text(shown(cell)) for cell in row))
        self._console.print(grid, soft_wrap=False)


def shown(text: str) -> str:
    """The text without control characters: a model's text must not control the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text.expandtabs(4))
