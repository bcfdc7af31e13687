"""What mkdocs makes of the code at build time, so that no page can go stale: a page for each setting, the command
line's reference, and the pieces that pages include by a comment:

    <!-- include table: demo -->                           a table of README.md or BENCHMARKS.md, from <!-- demo --> to
                                                           <!-- end -->
    <!-- include source: dspy_fst.optimizer:alternate -->  a function as it stands in the code
    <!-- include docstring: dspy_fst.fit -->               a module's docstring
"""

import ast
import re
import typing
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click
from typer.main import get_command

from dspy_fst.config import FSTConfig, source_of

ROOT = Path(__file__).parent.parent
NOTES = Path(__file__).with_name("settings.yaml")
BOUNDS = {"Ge": "at least", "Gt": "above", "Le": "at most", "Lt": "below"}
INCLUDE = re.compile(r"<!-- include (\w+): (\S+) -->")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the settings' pages below theirs in the navigation."""
    (settings,) = (entry["Settings"] for entry in config.nav or [] if "Settings" in entry)
    settings += [{name: f"settings/{name}.md"} for name in FSTConfig.model_fields]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of the code."""
    notes = read_notes()
    pages = {f"settings/{name}.md": setting_page(name, notes.get(name)) for name in FSTConfig.model_fields}
    pages |= {"settings/index.md": settings_index(), "reference/cli.md": command_line()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what the page includes."""
    return INCLUDE.sub(lambda found: INCLUDED[found[1]](found[2]), markdown)


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
        "Source of the default": plain(source_of(name)),
    }
    lines = [f"# {name}", "", described(name), "", *(f"- **{what}:** {fact}" for what, fact in facts.items())]
    if note:
        lines += ["", "## When to change it", "", note]
    return "\n".join(lines) + "\n"


def settings_index() -> str:
    """All settings at a glance."""
    rows = [
        f"| [{name}]({name}.md) | `{field.default!r}` | {plain(source_of(name))} |"
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


def described(name: str) -> str:
    """What the setting's docstring says."""
    return plain(FSTConfig.model_fields[name].description or "")


def plain(docstring: str) -> str:
    """A docstring as one line of Markdown.

    >>> plain("Below ``failure_score``.")
    'Below `failure_score`.'
    """
    return " ".join(docstring.replace("``", "`").split())


def shown_type(annotation: Any) -> str:
    """A type as one writes it; bounds are told apart from it.

    >>> shown_type(float | None)
    'float | None'
    """
    if typing.get_origin(annotation) is typing.Annotated:
        return shown_type(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is tuple:
        return f"tuple[{', '.join(map(shown_type, typing.get_args(annotation)))}]"
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
    """A table of the README or BENCHMARKS.md, which `python -m benchmarks.readme` writes."""
    pages = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "BENCHMARKS.md"))
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", pages, re.DOTALL)[1]  # type: ignore[index]


def _source(place: str) -> str:
    module, _, name = place.partition(":")
    text, tree = _parsed(module)
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    return f"```python\n{ast.get_source_segment(text, function)}\n```"


def _docstring(module: str) -> str:
    return ast.get_docstring(_parsed(module)[1]) or ""


def _parsed(module: str) -> tuple[str, ast.Module]:
    """A module's text and syntax; importing it could mean to import torch."""
    text = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
    return text, ast.parse(text)


INCLUDED = {"table": _table, "source": _source, "docstring": _docstring}
