"""Relay: the hidden operations, and the feedback for each of its two predictors."""

import dspy
import pytest
from dspy.utils import DummyLM

from programs.common import Task
from programs.lab import FeedbackProposer
from programs.lab.operations import BY_NAME
from programs.lab.proposer import states_rule
from programs.relay import build

SMALL = {"train": 40, "val": 4, "test": 4}


@pytest.fixture(scope="module")
def task() -> Task:
    return build(**SMALL, first="reverse", second="drop_last")


GOLD = dspy.Example(numbers="1 2 3 4", answer="4 3 2")


def judged(task: Task, pred_name: str | None = None, **said: str) -> tuple[float, str]:
    told = task.metric(GOLD, dspy.Prediction(**said), pred_name=pred_name)
    return told.score, told.feedback


def test_an_oracle_solves_the_problems_through_the_program(task: Task) -> None:
    for gold in task.testset:
        handed_on = task.metric.first(gold.numbers)
        with dspy.context(lm=DummyLM([{"answer": handed_on}, {"answer": gold.answer}])):
            pred = task.program(**gold.inputs())
        assert pred.handed_on == handed_on
        assert task.metric(gold, pred).score == 1.0


def test_the_second_predictor_is_judged_by_what_it_was_handed(task: Task) -> None:
    wrong_first = {"handed_on": "1 2 3 4", "answer": "1 2 3"}
    assert judged(task, "second", **wrong_first) == (0.0, "Correct.")
    assert judged(task, "first", **wrong_first)[1].startswith("Wrong. All values belong here")
    wrong_second = {"handed_on": "4 3 2 1", "answer": "4 3 2 1"}
    assert judged(task, "first", **wrong_second) == (0.0, "Correct.")
    assert judged(task, "second", **wrong_second)[1].startswith("Wrong. Too many values")


def test_only_the_right_answer_scores_and_any_text_is_judged(task: Task) -> None:
    assert judged(task, handed_on="4 3 2 1", answer=" 4 3  2\n") == (1.0, "Correct. Correct.")
    for odd in ("", "12", "\x00", "one two"):
        assert judged(task, handed_on=odd, answer=odd)[0] == 0.0
        assert "which is no list" in judged(task, "second", handed_on=odd, answer=odd)[1]


def test_half_of_the_feedback_hides_what_was_expected_and_none_names_an_operation() -> None:
    task = build(train=400, val=1, test=1)
    said = dspy.Prediction(handed_on="1 1", answer="2")
    told = [task.metric(gold, said, pred_name=name).feedback for gold in task.trainset for name in ("first", "second")]
    assert 0.4 < sum("Expected" in text for text in told) / len(told) < 0.6
    assert not any(states_rule(text) for text in told)


def test_the_laboratory_s_proposer_finds_each_predictor_s_operation(task: Task) -> None:
    shown = build(**SMALL, first="reverse", second="drop_last", vague=0.0)
    records: dict[str, list[dict[str, object]]] = {"first": [], "second": []}
    for gold in shown.trainset[:6]:
        said = dspy.Prediction(handed_on=gold.numbers, answer=gold.numbers)
        for name, kept in records.items():
            feedback = shown.metric(gold, said, pred_name=name).feedback
            kept.append(
                {
                    "Inputs": {"numbers": gold.numbers},
                    "Generated Outputs": {"answer": gold.numbers},
                    "Feedback": feedback,
                }
            )
    found = FeedbackProposer(reads=6)({"first": "a", "second": "b"}, records, ["first", "second"])
    for name, operation in (("first", "reverse"), ("second", "drop_last")):
        known = BY_NAME[operation]
        assert any(words in found[name].lower() for words in (*known.wordings, known.unheard)), found[name]


def test_an_unknown_operation_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"second='sing'.*rotate_left"):
        build(second="sing")
