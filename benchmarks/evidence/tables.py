"""Writes the tables of BENCHMARKS.md from the raw lines alone.

python -m benchmarks.evidence.tables
"""

import re
from pathlib import Path

from benchmarks.evidence.claims import TABLES
from benchmarks.evidence.raw import read

PAGE = Path(__file__).parent.parent.parent / "BENCHMARKS.md"
PLACE = re.compile(r"<!-- (\w+): (\w+) (\w+) ([\w:.]+)(?: from ([\w-]+))? -->\n.*?<!-- end -->", re.DOTALL)
"""``<!-- efficiency: long main reverse_drop from weaker -->`` to ``<!-- end -->``: claim, form, experiment, world and
base."""


def rendered(page: str) -> str:
    """The page with every table made anew."""

    def made(found: re.Match[str]) -> str:
        claim, form, experiment, world, base = found.groups()
        results = read(form, experiment)
        body = TABLES[claim](results, world, base or "base") if results else "not made yet"
        return f"{found[0].splitlines()[0]}\n{body}\n<!-- end -->"

    return PLACE.sub(made, page)


def main() -> None:
    PAGE.write_text(rendered(PAGE.read_text()))


if __name__ == "__main__":
    main()
