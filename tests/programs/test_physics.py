"""Physics: reading a letter from an answer, and the generated questions."""

import random

import dspy
import pytest
from dspy.utils import DummyLM

from programs.physics import build
from programs.physics.data import FORMULAE, LETTERS, public_example
from programs.physics.program import metric

GOLD = dspy.Example(choices="A. 3 m/s\nB. 6 m/s\nC. 9 m/s\nD. a drop. of rain", answer="B")


def judged(answer: str) -> tuple[float, str]:
    verdict = metric(GOLD, dspy.Prediction(answer=answer))
    return verdict.score, verdict.feedback


@pytest.mark.parametrize(
    "answer",
    ["B", "b", "(B)", "B.", " B) 6 m/s", "B: 6 m/s", r"\boxed{B}", "**B**", "The answer is B.", "Answer: (B)", "6 m/s"],
)
def test_the_right_letter_is_read_from_many_forms(answer: str) -> None:
    assert judged(answer) == (1.0, "Correct.")


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("C", "The answer is C, 9 m/s. The right choice is B, 6 m/s."),
        ("D", "The answer is D, a drop. of rain."),
        ("", "No single choice can be read from ''"),
        ("E", "No single choice can be read from 'E'"),
        ("A or B", "No single choice"),
        ("B is tempting, C", "No single choice"),
        ("A gas expands", "No single choice"),
        ("The answer is a number", "No single choice"),
        ("7 m/s", "No single choice"),
    ],
)
def test_feedback_names_the_right_choice(answer: str, fault: str) -> None:
    score, feedback = judged(answer)
    assert score == 0.0
    assert fault in feedback
    assert "The right choice is B" in feedback


def test_choices_differ_and_the_right_one_stands_anywhere() -> None:
    task = build(train=300, val=1, test=1)
    for gold in task.trainset:
        texts = [line.split(". ", 1)[1] for line in gold.choices.split("\n")]
        assert len(set(texts)) == len(LETTERS)
    counts = [sum(gold.answer == letter for gold in task.trainset) for letter in LETTERS]
    assert min(counts) > 45


def test_formulae_give_known_results() -> None:
    found = [formula.result(4, 2) for formula in FORMULAE]
    assert found == pytest.approx([8, 78.4, 32, 4 / 3, 0.0008, 1, 8, 2])
    rng = random.Random(0)
    for formula in FORMULAE:
        a, b = rng.uniform(2, 60), rng.uniform(2, 60)
        assert all(abs(mistake(a, b) / formula.result(a, b) - 1) > 0.001 for mistake in formula.mistakes)


def test_an_oracle_solves_the_offline_set_through_the_program() -> None:
    task = build(train=1, val=1, test=30)
    replies = {gold.question: {"reasoning": "It is known.", "answer": gold.answer} for gold in task.testset}
    with dspy.context(lm=DummyLM(replies)):
        assert [metric(gold, task.program(**gold.inputs())).score for gold in task.testset] == [1.0] * 30


def test_only_multiple_choice_in_physics_is_taken_from_the_public_set() -> None:
    row = {
        "question": "What falls?",
        "choices": {"label": ["A", "B"], "text": ["rain\nand snow", "smoke"]},
        "answerKey": "A",
        "domain": "Physics",
        "type": "mcq-2-choices",
    }
    example = public_example(row)
    assert example is not None
    assert (example.choices, example.answer) == ("A. rain and snow\nB. smoke", "A")
    assert metric(example, dspy.Prediction(answer="A")).score == 1.0
    for other in ({"domain": "Biology"}, {"type": "open-ended-qa"}, {"answerKey": ""}, {"choices": None}):
        assert public_example({**row, **other}) is None
