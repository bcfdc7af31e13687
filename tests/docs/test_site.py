"""The site builds without a warning, holds a page for every setting and command, and loads nothing from elsewhere."""

import html
import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import yaml
from typer.main import get_command

import dspy_fst
from docs.generate import INCLUDE, filled, pages
from dspy_fst.cli import app
from dspy_fst.config import FSTConfig, source_of
from dspy_fst.engine.options import InProcessSettings
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.project.project_file import PolicySettings, Project, ReflectionSettings
from tests.docs.pages import DOCS, ROOT, fences, literals

NOTES = yaml.safe_load((DOCS / "settings.yaml").read_text())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site's folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=_environment())
    assert built.returncode == 0, built.stderr
    return folder


def _environment():
    return {**os.environ, "NO_MKDOCS_2_WARNING": "1"}


def _text(page):
    """What a page says, without its markup."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", page.read_text())).split())


@pytest.mark.slow
def test_every_setting_has_a_page_with_its_default_and_its_source(site):
    for name, field in FSTConfig.model_fields.items():
        shown = _text(site / "settings" / f"{name}.html")
        assert f"Default: {field.default!r} Type:" in shown, name
        assert source_of(name).replace("`", "") in shown, name


def test_a_note_on_a_setting_stands_on_its_page(site):
    assert "When to change it" in (site / "settings" / "learning_rate.html").read_text()
    assert "When to change it" not in (site / "settings" / "adam_betas.html").read_text()


def test_every_note_is_about_a_setting_that_exists():
    assert NOTES
    assert set(NOTES) <= set(FSTConfig.model_fields)


def test_the_command_line_s_page_holds_every_command_and_option(site):
    text = (site / "reference" / "cli.html").read_text()
    commands = get_command(app).commands
    assert commands
    for name, command in commands.items():
        assert f"dspy-fst {name}" in text
        for option in (option for parameter in command.params for option in parameter.opts if option[0] == "-"):
            assert option in text, f"{name} {option}"


@pytest.mark.slow
def test_every_page_holds_what_the_code_says_now_so_that_it_can_be_read_on_a_code_host():
    made = pages()
    assert {DOCS / "reference" / f"{name}.md" for name in ("api", "cli", "engines", "project")} <= set(made)
    stale = [
        str(path.relative_to(ROOT)) for path, text in made.items() if not path.is_file() or path.read_text() != text
    ]
    assert not any(re.search(r"^::: ", text, re.MULTILINE) for text in made.values()), "write <!-- include api: ... -->"
    assert stale == [], "run `make pages` and commit what it writes"
    settings = set((DOCS / "settings").glob("*.md"))
    assert settings <= set(made), "a page of a setting that is no more; run `make pages`"


def test_an_include_that_was_changed_by_hand_is_written_anew_and_others_are_left_alone():
    page = (
        "# Title\n<!-- include docstring: dspy_fst.errors -->\n\nold\n\n<!-- end include -->\ntext\n<!-- include x -->"
    )
    made = INCLUDE.sub(filled, page)
    assert "old" not in made
    assert "What a user can meet" in made
    assert made.startswith("# Title\n<!-- include docstring: dspy_fst.errors -->\n\n")
    assert made.endswith("<!-- end include -->\ntext\n<!-- include x -->")
    assert INCLUDE.sub(filled, made) == made


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("project", [*Project.model_fields, *PolicySettings.model_fields, *ReflectionSettings.model_fields]),
        ("engines", [field.name for kind in (VLLMSettings, InProcessSettings) for field in fields(kind)]),
        ("api", dspy_fst.__all__),
    ],
)
def test_the_reference_holds_every_name(site, page, names):
    headed = set(re.findall(r"<h\d id=[^>]*><code>(\w+)</code>", (site / "reference" / f"{page}.html").read_text()))
    assert set(names) <= headed


def test_the_loop_on_the_site_is_the_loop_of_the_optimizer(site):
    shown = _text(site / "how-it-works.html")
    assert "for cycle in run.cycles():" in shown
    assert "run.commit_step(step, cycle, groups, batch, update, population)" in shown


def test_no_page_loads_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(FSTConfig.model_fields)
    loaded = re.compile(
        r"<(?:script|img|iframe|source)[^>]*\bsrc=\"?(?:https?:)?//|<link(?![^>]*canonical)[^>]*\bhref=\"?(?:https?:)?//"
    )
    assert [page.name for page in pages if loaded.search(page.read_text())] == []
    remote = re.compile(r"(?:url\(|@import )[\"']?(?:https?:)?//")
    assert [sheet.name for sheet in site.rglob("*.css") if remote.search(sheet.read_text())] == []


@pytest.fixture(scope="module")
def printed():
    """Every string of our code, in which dots that stand for what differs are left out."""
    return [_flat(text).replace("...", "") for folder in ("dspy_fst", "programs") for text in literals(ROOT / folder)]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["troubleshooting.md", "several-gpus.md", "parsing.md"])
def test_every_quoted_message_is_one_that_the_package_prints(printed, page):
    quoted = list(fences(DOCS / page, "text"))
    assert quoted
    assert [fence.where for fence in quoted if not _is_said(printed, fence.text)] == []


def _is_said(printed, message):
    """Whether a string of the code can print the message, whose dots stand for what differs."""
    pieces = re.compile(".*".join(re.escape(_flat(piece)) for piece in message.strip().split("...")), re.DOTALL)
    return any(pieces.search(text) for text in printed)


def _flat(text):
    return " ".join(text.split())
