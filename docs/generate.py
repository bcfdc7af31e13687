"""Writes what pages say of the code into the pages, so that they can be read on a code host as on the site:

    <!-- include table: demo -->                           a table that benchmarks/readme.py makes
    <!-- include source: dspy_fst.optimizer:alternate -->  a function as it stands in the code
    <!-- include docstring: dspy_fst.memory -->               a module's docstring
    <!-- include sizes: models -->                         the table of `dspy-fst sizes --table`; or what was measured
    <!-- include sizing: guide -->                         a table of `benchmarks/sizing.py`: guide, cards, ...
    <!-- include api: dspy_fst.save level=3 -->            the reference of a class or a function, with members=a,b,...
                                                           where not all of its members are told of

What is included stands between such a line and <!-- end include -->. A page for each setting, their index and the
command line's reference are written as whole files. `make pages` does it; a test holds that nothing is stale.
"""

import ast
import functools
import json
import re
import textwrap
import types
import typing
from pathlib import Path
from typing import Any

import griffe
import griffe2md
import yaml  # type: ignore[import-untyped]
from typer.cli import get_docs_for_click
from typer.main import get_command

from dspy_fst.config import FSTConfig, described, source_of

DOCS = Path(__file__).parent
ROOT = DOCS.parent
NOTES = DOCS / "settings.yaml"
GENERATED = "<!-- Written by `make pages` from the code; changes here are lost. -->"
BOUNDS = {"Ge": "at least", "Gt": "above", "Le": "at most", "Lt": "below"}
INCLUDE = re.compile(
    r"(?P<line><!-- include (?P<kind>\w+): (?P<what>[^>]+?) -->)(?:\n(?:(?!<!-- include ).)*?<!-- end include -->)?",
    re.DOTALL,
)
WIDTH = 110
"""Of a signature's lines."""
API = {
    **griffe2md.default_config,
    "show_root_full_path": False,
    "show_root_members_full_path": False,
    "show_object_full_path": False,
    "show_bases": False,
    "inherited_members": False,
    "summary": False,
    "show_docstring_attributes": False,
    "members_order": "source",
}
"""How griffe2md writes a class or a function."""


def main() -> None:
    """Write every page that is stale, and remove those of settings that are no more."""
    written = pages()
    for path in sorted((DOCS / "settings").glob("*.md")):
        if path not in written:
            path.unlink()
    for path, text in written.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))


def pages() -> dict[Path, str]:
    """Every page that holds something of the code -> its text as it should be."""
    notes = read_notes()
    whole = {f"settings/{name}.md": setting_page(name, notes.get(name)) for name in FSTConfig.model_fields}
    whole |= {"settings/index.md": settings_index(), "reference/cli.md": command_line()}
    made = {DOCS / path: f"{GENERATED}\n\n{text.strip()}\n" for path, text in whole.items()}
    for path in DOCS.rglob("*.md"):
        text = path.read_text(encoding="utf-8")
        if path not in made and "<!-- include " in text:
            made[path] = INCLUDE.sub(filled, text)
    return made


def filled(found: re.Match[str]) -> str:
    """An include's two lines with what belongs between them."""
    text = INCLUDED[found["kind"]](*found["what"].split())
    return f"{found['line']}\n\n{text.strip()}\n\n<!-- end include -->"


# ---- settings ----------------------------------------------------------------------------------


def read_notes() -> dict[str, str]:
    """Setting -> when to change it, written by hand."""
    notes: dict[str, str] = yaml.safe_load(NOTES.read_text(encoding="utf-8"))
    return notes


def setting_page(name: str, note: str | None) -> str:
    """A setting's page: what it is, its facts, and when to change it."""
    field = FSTConfig.model_fields[name]
    facts = {
        "Default": f"`{field.default!r}`",
        "Type": f"`{shown_type(field.annotation)}`",
        **({"Allowed": allowed} if (allowed := bounds(field)) else {}),
        "Source of the default": source_of(name),
    }
    lines = [f"# {name}", "", described(name), "", *(f"- **{what}:** {fact}" for what, fact in facts.items())]
    if note:
        lines += ["", "## When to change it", "", note]
    return "\n".join(lines) + "\n"


def settings_index() -> str:
    """All settings at a glance."""
    rows = [
        f"| [{name}]({name}.md) | `{field.default!r}` | {source_of(name)} |"
        for name, field in FSTConfig.model_fields.items()
    ]
    head = (
        "# Settings\n\nThe fields of `dspy_fst.FSTConfig`: arguments of `FSTOptimizer`, and keys below `recipe` in a "
        "project file. *Paper* is [Learning, Fast and Slow](https://arxiv.org/abs/2605.12484); *ours* marks what it "
        "does not publish. `dspy-fst check FILE` lists them with the values that your project gives them.\n\n"
        "`auto` is not among them: it stands for a number of `cycles`.\n\n"
        "| setting | default | source of the default |\n| --- | --- | --- |\n"
    )
    return head + "\n".join(rows) + "\n"


def shown_type(annotation: Any) -> str:
    """A type as one writes it; bounds are told apart from it.

    >>> shown_type(float | None)
    'float | None'
    """
    if typing.get_origin(annotation) is typing.Annotated:
        return shown_type(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is tuple:
        return f"tuple[{', '.join(map(shown_type, typing.get_args(annotation)))}]"
    if annotation is types.NoneType:
        return "None"
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(map(shown_type, typing.get_args(annotation)))
    if isinstance(annotation, type):
        return annotation.__name__
    return str(annotation).replace("typing.", "")


def bounds(field: Any) -> str:
    """What a number must keep to, in words."""
    rules = list(field.metadata)
    for argument in typing.get_args(field.annotation):
        if typing.get_origin(argument) is typing.Annotated:
            rules += typing.get_args(argument)[1].metadata
    told = [
        f"{words} {getattr(rule, kind.lower()):g}"
        for rule in rules
        for kind, words in BOUNDS.items()
        if type(rule).__name__ == kind
    ]
    return ", ".join(dict.fromkeys(told))


# ---- the command line --------------------------------------------------------------------------


def command_line() -> str:
    """The reference, written by typer from the commands themselves."""
    from dspy_fst.cli import app

    command = get_command(app)
    context = command.make_context("dspy-fst", [], resilient_parsing=True)
    text = get_docs_for_click(obj=command, ctx=context, name="dspy-fst", title="Command line")
    codes = (
        "Results go to stdout, everything else to stderr. Exit codes: 0, done; 2, nothing was started, the command or "
        "its input is wrong; 1, it failed, and a run can go on; 130, Ctrl-C; 143, SIGTERM.\n"
    )
    title, _, rest = text.partition("\n")
    return f"{title}\n\n{codes}{rest}"


# ---- what pages include ------------------------------------------------------------------------


def _table(name: str) -> str:
    """A table of figures that lie in benchmarks/results."""
    from benchmarks.readme import tables

    return tables()[name]


def _source(place: str) -> str:
    module, _, name = place.partition(":")
    text, tree = _parsed(module)
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    return f"<!-- check: stands in the code -->\n```python\n{ast.get_source_segment(text, function)}\n```"


def _docstring(module: str) -> str:
    return ast.get_docstring(_parsed(module)[1]) or ""


def _sizes(which: str) -> str:
    """The page on sizes has two: models against cards, and the arithmetic against what was measured."""
    from benchmarks.sizes import RESULT, measured_table
    from dspy_fst.cli.sizes import size_table

    return size_table() if which == "models" else measured_table(json.loads(RESULT.read_text(encoding="utf-8")))


def _sizing(which: str) -> str:
    """The page on time has four: cards, shares that are assumed, machines and models, and runs that were foretold."""
    from benchmarks import sizing

    return str(getattr(sizing, which)())


def _parsed(module: str) -> tuple[str, ast.Module]:
    """A module's text and syntax; importing it could mean to import torch."""
    place = ROOT / module.replace(".", "/")
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    text = file.read_text(encoding="utf-8")
    return text, ast.parse(text)


@functools.cache
def _package() -> griffe.Module:
    """The package as griffe reads it, without importing it."""
    extensions = griffe.load_extensions(str(DOCS / "doctests.py"))
    options = {"ignore_init_summary": True, "returns_multiple_items": False}
    loader = griffe.GriffeLoader(
        search_paths=[ROOT],
        extensions=extensions,
        docstring_parser="google",
        docstring_options=options,  # type: ignore[arg-type]
        allow_inspection=False,
    )
    package = loader.load("dspy_fst")
    assert isinstance(package, griffe.Module)
    return package


def _api(place: str, *options: str) -> str:
    """The reference of a class or a function, as Markdown that links to nothing outside of the page."""
    told = dict(option.split("=") for option in options)
    made = _package()[place.removeprefix("dspy_fst.")]
    config = {**API, "heading_level": int(told.get("level", 2))}
    if "members" in told:
        config["members"] = told["members"].split(",")
    target = made.final_target if made.is_alias else made
    return _plain_markdown(griffe2md.render_object_docs(target, config))  # type: ignore[arg-type]


def _plain_markdown(text: str) -> str:
    """griffe2md's Markdown with types as code instead of links, and docstrings' double backticks as single ones."""
    text = re.sub(r"<code>(.*?)</code>", lambda found: "`" + LINK.sub(r"\1", found[1]) + "`", text)
    text = re.sub(r"- \*\*\*\*(\w+)\*\*", r"- **\*\*\1**", text)
    fenced = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    fenced[::2] = [part.replace("``", "`") for part in fenced[::2]]
    fenced[1::2] = [re.sub(r"```python\n(.*)\n```", _signature, part) for part in fenced[1::2]]
    return re.sub(r"\n{3,}", "\n\n", "".join(fenced))


def _signature(found: re.Match[str]) -> str:
    """A signature on lines that can be read; as text, since a page's fences of Python are run and formatted."""
    lines = textwrap.wrap(found[1], WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(["```text", *lines, "```"])


LINK = re.compile(r"\[([^\[\]]*)\]\(#[^)]*\)")
INCLUDED = {
    "table": _table,
    "source": _source,
    "docstring": _docstring,
    "api": _api,
    "sizes": _sizes,
    "sizing": _sizing,
}

if __name__ == "__main__":
    main()
