"""What people are shown of a step's rollouts."""

import dspy
from dspy.teleprompt.bootstrap_trace import FailedPrediction

from dspy_fst.rollout.recording import tag_predictors
from dspy_fst.rollout.shown import LONGEST, shown, telling
from dspy_fst.types import Candidate, Group, Rollout

CANDIDATE = Candidate({"self": "Sort."})


def rollout(reward, problem=0, **fields):
    return Rollout(problem, CANDIDATE, (), reward, mask="timeout" if reward is None else None, **fields)


def test_the_best_and_the_worst_of_the_widest_group_are_shown():
    flat = Group(0, tuple(rollout(0.5) for _ in range(3)))
    wide = Group(1, tuple(rollout(reward, problem=1) for reward in (0.1, None, 0.9, 0.4)))
    best, worst = telling([flat, wide])
    assert (best.reward, worst.mask) == (0.9, "timeout")


def test_nothing_is_shown_of_nothing():
    assert telling([]) == []


def test_a_module_shows_what_went_in_and_came_out():
    program = dspy.Predict("question -> answer")
    tag_predictors(program)
    long = "x" * (3 * LONGEST)
    entries = (
        (program, {"question": "2 1"}, dspy.Prediction(answer=long)),
        (program, {"question": "3"}, FailedPrediction("no fields")),
    )
    data = shown(rollout(0.5, trace=entries, feedback="Nearly."))
    first, second = data["modules"]
    assert (first["name"], first["inputs"]) == ("self", {"question": "2 1"})
    assert len(first["outputs"]["answer"]) < LONGEST + 10
    assert second["reply"] == "no fields"
    assert data["feedback"] == "Nearly."
