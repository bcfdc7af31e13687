"""What other trainers call a setting is refused with ours, and docs/losses.md lists no name that is not."""

import re
from pathlib import Path

import pytest

from dspy_fst import FSTConfig, FSTOptimizer
from dspy_fst.errors import ConfigurationError
from dspy_fst.preflight.warm_start_checks import warm_start_warnings
from dspy_fst.provider.job_settings import FineTuneSettings, ReinforceSettings
from dspy_fst.recipe.other_names import INSTEAD
from tests.fakes import scripted_policy
from tests.relay import Relay

PAGE = Path(__file__).parent.parent / "docs" / "losses.md"


def listed() -> list[tuple[str, str]]:
    """(a name elsewhere, the cell of ours) of each setting in the table of the page."""
    table = PAGE.read_text(encoding="utf-8").split("## What others call it")[1]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    found = []
    for ours, *theirs in rows:
        for quoted in re.findall(r"`([^`]+)`", " ".join(theirs)):
            name = re.match(r"(?:\w+\.)?([a-z_]+)(?:[=:]|$)", quoted)
            found += [(name[1], ours)] if name else []
    return found


def test_every_name_of_the_page_s_table_is_refused_with_ours():
    assert len({name for name, _ in listed()}) > 15
    for name, ours in listed():
        assert any(setting in INSTEAD[name] for setting in re.findall(r"[a-z_]{4,}", ours)), (name, ours)


@pytest.mark.parametrize("name", sorted(INSTEAD))
def test_a_run_and_a_job_name_what_is_meant(name):
    if name not in ("teacher",):
        with pytest.raises(ConfigurationError) as refused:
            FSTOptimizer(metric=lambda *_: 0.0, **{name: 1})
        assert refused.value.faults == (f"{name}: there is no such setting; {INSTEAD[name]}",)
    for kind in (FineTuneSettings, ReinforceSettings):
        faults: list[str] = []
        if name not in kind.model_fields:
            assert kind.of({name: 1}, faults) is None
            assert faults[0].startswith(f"train_kwargs: {name}: there is no such setting; ")


def test_what_the_table_advises_exists():
    advised = {setting for words in INSTEAD.values() for setting in re.findall(r"\b([a-z_]+)=", words)}
    elsewhere = {"engine", "rank", "teacher", "track"}
    assert advised - {*FSTConfig.model_fields} == elsewhere


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"warm_start_epochs": 5}, "warm_start_epochs=5 does nothing without a warm start"),
        ({"warm_start_epochs": 5, "warm_start_score": 0.5}, "do nothing without a warm start"),
        (
            {"warm_start": "labels", "warm_start_score": 0.5},
            "_score=0.5 does nothing under warm_start='labels'",
        ),
    ],
)
def test_settings_of_a_warm_start_that_is_not_made_are_told(settings, words):
    student, trainset = Relay(), []
    student.set_lm(scripted_policy(lambda *_: "")[0])
    told = [*warm_start_warnings(FSTConfig(**settings), student, trainset, None)]
    assert words in told[0]
    default = {name: value for name, value in settings.items() if name == "warm_start"}
    assert words not in " ".join(warm_start_warnings(FSTConfig(**default), student, trainset, None))
    if "warm_start" not in settings:
        assert [*warm_start_warnings(FSTConfig(**settings), student, trainset, student)] == []
