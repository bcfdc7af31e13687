"""The pages of the documentation as tests see them: their fences, and what says how each is checked."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from docs.generate import GENERATED, INCLUDE

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(
    r"(?:<!-- check: (?P<mark>[^>]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Fence:
    """A piece of code on a page."""

    page: Path
    language: str
    """Empty for commands on pages that say no language."""
    text: str
    mark: str
    """Why it is only compiled; empty when it runs here."""

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text.strip().splitlines()[0]}"


def fences(page: Path, *languages: str) -> Iterator[Fence]:
    """The page's fences in these languages, in order."""
    for found in FENCE.finditer(page.read_text(encoding="utf-8")):
        if found["language"] in languages:
            yield Fence(page, found["language"], found["text"], found["mark"] or "")


def commands(page: Path) -> Iterator[str]:
    """Every command line of a page: those in fences, and those of ours in the text."""
    for fence in fences(page, "", "bash"):
        yield from (
            line for line in fence.text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")
        )
    prose = FENCE.sub("", _by_hand(page.read_text(encoding="utf-8")))
    yield from re.findall(r"`((?:dspy-fst|make|python -m) [^`]+)`", prose)


def _by_hand(text: str) -> str:
    """A page without what is written from the code: docstrings name commands by their first words alone."""
    return "" if text.startswith(GENERATED) else INCLUDE.sub("", text)


def literals(folder: Path) -> list[str]:
    """Every string of the package's code; ``\\0`` stands for what an f-string fills in."""
    texts = []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts
