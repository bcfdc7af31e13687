"""Writes the tables of BENCHMARKS.md from raw lines alone, or prints those of lines not published.

python -m benchmarks.evidence.tables
python -m benchmarks.evidence.tables runs/evidence/short/main.jsonl
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.claims import TABLES
from benchmarks.evidence.raw import Lacking, Result, read

PAGES = [Path(__file__).parent.parent.parent / "BENCHMARKS.md"]
PLACE = re.compile(r"<!-- (\w+): (\w+) (\w+) ([\w:.]+)(?: from ([\w-]+))? -->\n.*?<!-- end -->", re.DOTALL)
"""``<!-- efficiency: long main reverse_drop from weaker -->`` to ``<!-- end -->``: claim, form, experiment (or "all"),
world (or "all") and base."""


def rendered(page: str) -> str:
    """The page with every table made anew."""

    def made(found: re.Match[str]) -> str:
        return f"{found[0].splitlines()[0]}\n{_published(*found.groups('base'))}\n<!-- end -->"

    return PLACE.sub(made, page)


def _published(claim: str, form: str, experiment: str, world: str, base: str) -> str:
    results = read(form, experiment)
    return _body(claim, results, world, base) if results else "not made yet"


def _body(claim: str, results: Sequence[Result], world: str, base: str) -> str:
    try:
        return TABLES[claim](results, world, base)
    except Lacking as lack:
        return f"{lack}: no such table"


OF_ONE_WORLD = ("efficiency", "ceiling", "drift", "first_signal", "two_by_two", "entropy", "costs")
"""Claims that need no more than the main comparison on a world."""


def printed(results: Sequence[Result]) -> str:
    """Every table that these lines can fill, by world and base model."""
    kinds = dict.fromkeys((result["world"], result["base"]) for result in results if not result["carry"])
    return "\n\n".join(
        f"## {claim}: {world} from {base}\n\n{_body(claim, results, world, base)}"
        for world, base in kinds
        for claim in OF_ONE_WORLD
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, help="raw lines to print the tables of")
    options = parser.parse_args(arguments)
    if options.results is None:
        for page in PAGES:
            page.write_text(rendered(page.read_text()))
    else:
        if not options.results.is_file():
            parser.error(f"{options.results}: no such file; python -m benchmarks.evidence.grid says where it wrote")
        print(printed([json.loads(line) for line in options.results.read_text().splitlines()]))


if __name__ == "__main__":
    main()
