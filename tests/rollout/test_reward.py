"""Scores and feedback of single predictors: how a metric gives them, and what is refused."""

import dspy
import pytest

from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward, UnmeasuredError, feedback_by
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.types import Problem
from tests.fakes import fields, scripted_policy

NAMES = frozenset({"draft", "answer"})
PROBLEM = Problem(0, dspy.Example(question="q", answer="yes").with_inputs("question"))


class TwoStep(dspy.Module):
    def __init__(self):
        super().__init__()
        self.draft = dspy.Predict("question -> draft")
        self.answer = dspy.Predict("draft -> answer")

    def forward(self, question):
        return self.answer(draft=self.draft(question=question).draft)


def judged(given, kind=dspy.Prediction):
    return Reward(lambda gold, pred: kind(**given), NAMES)(dspy.Example(), dspy.Prediction())


def play(said, metric, answered="[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]"):
    """One rollout in which ``draft`` and ``answer`` say so."""
    program = TwoStep()
    policy, engine = scripted_policy(
        lambda messages, seed: said if "`question`" in messages[0]["content"] else answered
    )
    program.set_lm(policy)
    rollouter = Rollouter(
        program, Reward(metric, NAMES), RolloutSettings(num_threads=1, format_failure_score=-1.0), engine.expect
    )
    return rollouter.rollout([Task(PROBLEM, read_texts(program))], "test")[0]


@pytest.mark.parametrize("kind", [dspy.Prediction, dict])
def test_a_metric_may_score_predictors_and_speak_to_them(kind):
    given = {
        "score": 0.5,
        "feedback": "So so.",
        "predictor_scores": {"draft": True},
        "predictor_feedback": {"draft": "Good."},
    }
    score = judged(given, kind)
    assert (score.value, score.predictor_scores) == (0.5, {"draft": 1.0})
    assert (score.feedback_for("draft"), score.feedback_for("answer")) == ("Good.", "So so.")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"draft": float("nan")}, "metric returned nan for 'draft'"),
        ({"draft": float("inf")}, "metric returned inf for 'draft'"),
        ({"draft": None}, "metric returned NoneType for 'draft'"),
        ({"draft": "good"}, "metric returned str for 'draft'"),
        ({"drafts": 1.0, "answer": 1.0}, "metric returned predictor_scores of ['drafts'], no predictors"),
        ([0.5, 1.0], "metric returned predictor_scores as list, not as a dict by predictor"),
    ],
)
def test_a_score_that_is_none_measures_nothing(given, reason):
    with pytest.raises(UnmeasuredError) as caught:
        judged({"score": 1.0, "predictor_scores": given})
    assert str(caught.value) == reason


class Odd:
    """A score of a class whose conversion fails in its own way, as a tensor's of two numbers does."""

    def __float__(self):
        raise RuntimeError("two numbers cannot be converted")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (10**400, "metric returned int that is no score (OverflowError)"),
        (Odd(), "metric returned Odd that is no score (RuntimeError)"),
        (dspy.Prediction(feedback="good"), "metric returned Prediction that is no score (KeyError)"),
    ],
)
def test_what_cannot_be_read_as_a_score_measures_nothing(given, reason):
    with pytest.raises(UnmeasuredError) as caught:
        Reward(lambda gold, pred, trace=None: given)(dspy.Example(), dspy.Prediction())
    assert str(caught.value) == reason


def test_a_stranger_is_refused_together_with_what_there_is():
    with pytest.raises(UnmeasuredError, match=r"predictor_feedback of \['drafts'\]") as caught:
        judged({"score": 1.0, "predictor_feedback": {"drafts": "Good."}})
    assert str(caught.value.__cause__) == "the program's predictors are answer, draft"


def test_objectives_of_gepa_are_not_taken_for_predictors():
    assert judged({"score": 1.0, "objective_scores": {"brevity": 0.5}}).predictor_scores == {}


def test_a_rollout_carries_its_predictors_scores_and_a_masked_one_says_which_name_is_wrong():
    scored = play(fields(draft="d"), lambda gold, pred: dspy.Prediction(score=1.0, predictor_scores={"draft": 0.25}))
    assert (scored.reward, scored.predictor_scores, scored.failed_in) == (1.0, {"draft": 0.25}, None)
    masked = play(fields(draft="d"), lambda gold, pred: dspy.Prediction(score=1.0, predictor_scores={"drafts": 0.25}))
    assert (masked.reward, masked.mask) == (None, "metric returned predictor_scores of ['drafts'], no predictors")
    assert "answer, draft" in masked.feedback


def test_a_failure_names_its_predictor_and_has_no_scores():
    failed = play("no fields at all", lambda gold, pred: 1.0)
    assert (failed.reward, failed.failure, failed.failed_in, failed.predictor_scores) == (-1.0, "parse", "draft", {})
    assert play(fields(draft="d"), lambda gold, pred: 1.0, answered="nothing").failed_in == "answer"


def test_the_reflection_reads_what_was_said_of_its_predictor():
    given = {"score": 0.5, "feedback": "So so.", "predictor_feedback": {"draft": "Too long."}}
    told = feedback_by(Reward(lambda gold, pred: given, NAMES))
    asked = (dspy.Example(), dspy.Prediction(), None)
    assert (told(*asked, "draft", None), told(*asked, "answer", None)) == ("Too long.", "So so.")
