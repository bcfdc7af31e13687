"""An outcome is a type; the labels that stand for it on disk are written and read in one place."""

import ast
import re
from pathlib import Path

import pytest

from dspy_fst.outcomes.outcome import Outcome, OutcomeCounts
from dspy_fst.types import Candidate, Rollout

ROOT = Path(__file__).parent.parent.parent
HOME = ROOT / "dspy_fst" / "outcomes"
PREFIX = re.compile(r"(masked|failed):( |$)")
READERS = ("startswith", "removeprefix", "partition", "split")
OUTCOMES = {
    "scored": Outcome("scored"),
    "failed: parse": Outcome("failed", "parse"),
    "masked: timeout": Outcome("masked", "timeout"),
    "masked: outage: ConnectionError": Outcome("masked", "outage: ConnectionError"),
    "failed: masked: x": Outcome("failed", "masked: x"),
}


@pytest.mark.parametrize("label", OUTCOMES)
def test_a_label_is_written_and_read_back(label):
    assert OUTCOMES[label].label == label
    assert Outcome.of_label(label) == (None if label == "scored" else OUTCOMES[label])


@pytest.mark.parametrize("name", ["groups", "failed", "masked: ", "engine: restarted", "reflections_failed", ""])
def test_another_count_is_no_outcome(name):
    assert Outcome.of_label(name) is None
    assert OutcomeCounts.of({name: 3}).labels == {}


@pytest.mark.parametrize("label", OUTCOMES)
def test_the_fields_of_a_sample_are_written_and_read_back(label):
    told = Outcome(OUTCOMES[label].kind, OUTCOMES[label].reason, "Nearly.")
    assert Outcome.of_fields(told.as_fields()) == told


def test_a_sample_of_an_older_release_holds_less():
    assert Outcome.of_fields({}) == Outcome("scored")
    assert Outcome.of_fields({"mask": "", "failure": "", "feedback": None}) == Outcome("scored")


@pytest.mark.parametrize(
    "fields", [("scored", "parse"), ("failed", ""), ("masked",)], ids=["scored", "failed", "masked"]
)
def test_a_reason_is_given_exactly_when_nothing_was_scored(fields):
    with pytest.raises(ValueError, match="reason"):
        Outcome(*fields)


@pytest.mark.parametrize(
    ("reward", "outcome"),
    [(None, Outcome("scored")), (None, Outcome("failed", "parse")), (1.0, Outcome("masked", "timeout"))],
    ids=["scored", "failed", "masked"],
)
def test_a_rollout_is_masked_exactly_when_it_has_no_reward(reward, outcome):
    with pytest.raises(ValueError, match="a rollout has a reward or is masked"):
        Rollout(0, Candidate({}), (), reward, outcome)


def test_outcomes_are_counted_by_reason_masked_ones_first():
    ended = [Outcome("failed", "parse", str(i)) for i in range(3)] + [Outcome("scored"), Outcome("masked", "timeout")]
    counts = OutcomeCounts.over(ended)
    assert list(counts.labels.items()) == [("masked: timeout", 1), ("failed: parse", 3)]
    assert OutcomeCounts.of({"rollouts": 5, **counts.labels}) == counts
    assert (counts.masked, counts.failed) == ({"timeout": 1}, {"parse": 3})
    assert counts.words == "masked: timeout x1, failed: parse x3"


def spelled(path: Path) -> list[str]:
    """Strings that begin as a label does, and calls that take one apart."""
    tree = ast.parse(path.read_text())
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    calls = [
        arg.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in READERS
        for arg in node.args
        if isinstance(arg, ast.Constant)
    ]
    return [text for text in texts if PREFIX.match(text)] + [text for text in calls if text in ("masked", "failed")]


@pytest.mark.slow
@pytest.mark.parametrize("package", ["dspy_fst", "benchmarks", "programs"])
def test_no_other_code_spells_a_label(package):
    paths = [path for path in (ROOT / package).rglob("*.py") if HOME not in path.parents]
    assert {str(path.relative_to(ROOT)): found for path in paths if (found := spelled(path))} == {}


def test_no_template_spells_a_label():
    pages = [*(ROOT / "dspy_fst").rglob("*.html")]
    assert pages
    assert [page.name for page in pages if re.search(r"\b(masked|failed): *{{", page.read_text())] == []
