"""A search with fewer anchors than were asked for is told of before the run."""

from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_fst import PolicyLM
from dspy_fst.config import FSTConfig, make_config
from dspy_fst.preflight.demo_checks import demo_faults
from dspy_fst.training.anchors import anchor_warnings, fewest_anchors
from dspy_fst.training.request import Arguments, Proposers, check
from programs.lab import BASE, build
from tests.test_compile import propose

LARGER = "more problems_per_step or steps_per_cycle: anchors are taken from a cycle's 24 problems"


def examples(number: int, different: int = 1000) -> list[dspy.Example]:
    return [dspy.Example(question=f"q{i % different}", answer=f"{i}").with_inputs("question") for i in range(number)]


def recipe(**settings: Any) -> FSTConfig:
    return FSTConfig(**{"steps_per_cycle": 3, "problems_per_step": 8, "cycles": 2, **settings})


@pytest.mark.parametrize(
    ("settings", "number", "fewest"),
    [({}, 100, 24), ({"anchors": 10}, 100, 10), ({"anchors": 64}, 24, 24), ({}, 16, 16), ({"method": "rl"}, 8, 8)],
)
def test_anchors_are_counted_as_a_search_has_them(settings: dict[str, Any], number: int, fewest: int) -> None:
    assert fewest_anchors(recipe(**settings), examples(number)) == fewest


def test_problems_with_the_same_inputs_count_once_to_another_optimizer() -> None:
    assert fewest_anchors(recipe(), examples(24, different=12)) == 24
    assert fewest_anchors(recipe(), examples(24, different=12), by_inputs=True) == 12


def test_more_anchors_than_a_cycle_has_problems_are_told_with_what_helps() -> None:
    assert anchor_warnings(recipe(), 16) == anchor_warnings(recipe(anchors=24), 24) == []
    (settings,) = anchor_warnings(recipe(anchors=64), 24)
    assert settings.startswith("anchors=64: a cycle has as few as 24 different problems")
    assert settings.endswith(f"leave anchors out, or use {LARGER}")
    (trainset,) = anchor_warnings(recipe(anchors=24), 16)
    assert trainset.endswith("or use more examples in the trainset")
    assert anchor_warnings(recipe(anchors=64, method="rl"), 24) == []
    (at_once,) = anchor_warnings(recipe(proposals_at_once=8), 10)
    assert "10 anchors have 3 minibatches" in at_once


def test_no_advice_names_a_setting_that_cannot_help() -> None:
    program = dspy.Predict("question -> answer")
    (fault,) = demo_faults(recipe(anchors=8, max_bootstrapped_demos=8), program, examples(100), 8)
    assert fault.endswith("use at most 7, or more anchors (at most 24)")
    (fault,) = demo_faults(recipe(anchors=64, max_bootstrapped_demos=24), program, examples(100), 24)
    assert fault.endswith(f"use at most 23, or {LARGER}")
    (fault,) = demo_faults(recipe(max_bootstrapped_demos=16), program, examples(16), 16)
    assert fault.endswith("use at most 15, or more examples in the trainset")
    _, (wrong,) = make_config({"proposals_at_once": 9, "anchors": 24})
    assert wrong.endswith("use proposals_at_once=8, or more anchors (at most 192)")


def test_check_tells_a_cut_of_the_anchors(tmp_path: Path) -> None:
    lab = build(train=16, val=1, test=1)
    lab.program.set_lm(PolicyLM(BASE, engine="in_process", max_tokens=16))
    settings = {"problems_per_step": 8, "anchors": 17}
    given = Arguments(
        lab.program, lab.trainset, lab.metric, proposers=Proposers(propose=propose), run_dir=tmp_path, settings=settings
    )
    assert [told for told in check(given).warnings if told.startswith("anchors=17: a cycle has as few as 16 ")]
