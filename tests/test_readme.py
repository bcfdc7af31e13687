"""What the README and the tutorial show is what the repository holds."""

import inspect
import re
import textwrap
from pathlib import Path

import dspy

from benchmarks.readme import BENCHMARKS, README, render
from dspy_fst import optimizer
from dspy_fst.serve.schema import schema_of

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.md"


def snippets(page: Path = README) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= 1500


def test_the_loop_is_quoted_as_it_is_and_fits_a_screen():
    source = inspect.getsource(optimizer.alternate)
    quoted = next(snippet for snippet in snippets() if "run.cycles()" in snippet)
    assert textwrap.indent(quoted, "    ").strip() in source
    assert len(source.splitlines()) <= 24


def test_the_snippets_are_python():
    for snippet in snippets():
        compile(snippet, "README.md", "exec")


def test_the_tables_are_those_of_the_committed_figures():
    for page in (README, BENCHMARKS):
        assert render(page.read_text()) == page.read_text()


def test_every_place_that_is_named_exists():
    named = set(re.findall(r"`((?:dspy_fst|programs|benchmarks|tests)/[\w/.]*)`", README.read_text()))
    assert named
    assert all((ROOT / place).exists() for place in named)


def test_the_example_s_program_can_be_served_and_its_metric_tells_faults():
    example = next(snippet for snippet in snippets(TUTORIAL) if "class Triage" in snippet)
    namespace = {}
    exec(example.partition("with open(")[0], namespace)
    inputs = schema_of(namespace["Triage"](), None).inputs.model_fields
    assert list(inputs) == ["ticket"]
    gold, pred = dspy.Example(team="billing", urgent=True), dspy.Prediction(team="sales", urgent=True)
    judged = namespace["metric"](gold, pred)
    assert judged.score == 0.5
    assert judged.feedback == "team should be 'billing'"


def test_each_figure_of_what_was_found_is_in_a_table_of_the_evidence():
    page = BENCHMARKS.read_text()
    found = re.search(r"## What was found\n.*?(?=\n## )", page, re.DOTALL)[0]
    told = re.search(r"## Does it do what the paper says\?\n.*?(?=\n## )", README.read_text(), re.DOTALL)[0]
    tables = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    figures = set(re.findall(r"\d+\.\d+", found + told.replace("2605.12484", "")))
    assert len(figures) > 20
    assert figures - set(re.findall(r"\d+\.\d+", tables)) == set()
    verdicts = re.search(r"<!-- aims: long all all -->\n(.*?)<!-- end -->", page, re.DOTALL)[1]
    assert f"{verdicts.count('| yes |')} of the {verdicts.count('| yes |') + verdicts.count('| no |')} aims" in found
