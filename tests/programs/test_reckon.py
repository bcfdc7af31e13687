"""Reckon: the tool, the hidden rules, the feedback for each predictor, the proposer that reads it."""

from typing import Any

import dspy
import pytest
from dspy.utils import DummyLM

from programs.common import Task
from programs.reckon import build
from programs.reckon.program import NOTHING, calculate
from programs.reckon.proposer import proposer
from programs.reckon.skills import PLANS, REPORTS

SMALL = {"train": 40, "val": 4, "test": 4}


@pytest.fixture(scope="module")
def task() -> Task:
    return build(**SMALL)


def judged(
    task: Task, pred_name: str | None = None, gold: dspy.Example | None = None, **said: str
) -> tuple[float, str]:
    told = task.metric(gold or task.trainset[0], dspy.Prediction(**said), pred_name=pred_name)
    return told.score, told.feedback


# The tool


@pytest.mark.parametrize(
    ("text", "value"), [("3 + 4 * 2", "11"), ("7", "7"), (" 1 - 9 ", "-8"), ("(1 + 2) * 3", "9"), ("09 + 1", NOTHING)]
)
def test_the_calculator_knows_plus_minus_and_times(text: str, value: str) -> None:
    assert calculate(text) == value


@pytest.mark.parametrize(
    "text", ["", "two", "9 ** 9 ** 9", "__import__('os')", "1 / 2", "1.5 + 1", "True", "1 +" * 40, "(" * 60]
)
def test_the_calculator_refuses_everything_else(text: str) -> None:
    assert calculate(text) == NOTHING


# The hidden rules


@pytest.mark.parametrize("plan", [skill.name for skill in PLANS])
@pytest.mark.parametrize("report", [skill.name for skill in REPORTS])
def test_an_oracle_solves_every_rule_through_the_program(plan: str, report: str) -> None:
    task = build(**SMALL, plan=plan, report=report)
    skills = {skill.name: skill for skill in (*PLANS, *REPORTS)}
    gold = task.testset[0]
    replies = [{"calculation": skills[plan].act(gold)}, {"answer": skills[report].act(gold)}]
    with dspy.context(lm=DummyLM(replies)):
        pred = task.program(**gold.inputs())
    assert (pred.result, pred.answer) == (gold.result, gold.answer)
    assert task.metric(gold, pred).score == 1.0


def test_an_unknown_rule_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"plan='root'.*first_two"):
        build(plan="root")
    with pytest.raises(ValueError, match=r"report='song'.*then_last"):
        build(report="song")


def test_sets_are_disjoint_and_follow_the_seed(task: Task) -> None:
    def lists(of: Task) -> list[str]:
        return [gold.numbers for gold in (*of.trainset, *of.valset, *of.testset)]

    assert len(set(lists(task))) == len(lists(task)) == 48
    assert lists(task) == lists(build(**SMALL)) != lists(build(**SMALL, seed=1))


# The metric


def test_each_predictor_is_told_of_its_own_part_and_no_rule_is_named(task: Task) -> None:
    for gold in task.trainset:
        score, feedback = judged(task, "plan", gold, calculation="1", result="999", answer="5")
        assert score == 0.0
        assert "calculation" in feedback
        assert "answer" not in feedback
        score, feedback = judged(task, "report", gold, calculation="1", result="999", answer="5")
        assert "For the result 999 the answer" in feedback
        assert "calculation" not in feedback
        assert not any(words in feedback for skill in (*PLANS, *REPORTS) for words in skill.wordings)


def test_a_report_is_judged_by_the_result_that_it_was_given(task: Task) -> None:
    gold = task.trainset[0]
    last = gold.numbers.split()[-1]
    score, feedback = judged(task, "report", gold, calculation="1", result="999", answer=f"999 {last}")
    assert (score, feedback) == (0.0, "Wrong. For the result 999 the answer is right.")


def test_half_of_the_feedback_hides_what_was_expected(task: Task) -> None:
    said = {"calculation": "1", "result": "999", "answer": "5"}
    shown = ["should" in judged(task, None, gold, **said)[1] for gold in build(train=400, val=1, test=1).trainset]
    assert 0.4 < sum(shown) / len(shown) < 0.6
    open_task = build(**SMALL, vague=0.0)
    assert all("should" in judged(open_task, None, gold, **said)[1] for gold in open_task.trainset)


def test_no_calculation_is_called_so(task: Task) -> None:
    assert "'x y' is no calculation" in judged(task, "plan", calculation="x y", result=NOTHING, answer="5")[1]


# The proposer


def records(task: Task, name: str) -> list[dict[str, Any]]:
    said = {"calculation": "1 + 1", "result": "2", "answer": "5 5 5"}
    output = {"plan": "calculation", "report": "answer"}[name]
    return [
        {
            "Inputs": {"numbers": gold.numbers, "result": "2"},
            "Generated Outputs": {output: said[output]},
            "Feedback": judged(task, name, gold, **said)[1],
        }
        for gold in task.trainset
    ]


def test_the_proposer_asks_for_the_right_skills_when_it_was_shown_enough() -> None:
    task = build(**SMALL, vague=0.0)
    reads_all = proposer()
    reads_all.reads = 40
    found = reads_all(
        {"plan": "p", "report": "r"}, {name: records(task, name) for name in ("plan", "report")}, ["plan", "report"]
    )
    wordings = {skill.name: skill.wordings for skill in (*PLANS, *REPORTS)}
    assert any(words in found["plan"].lower() for words in wordings["first_two"])
    assert any(words in found["report"].lower() for words in wordings["then_last"])


def test_the_proposer_may_err_on_vague_feedback_and_repeats_itself() -> None:
    task = build(**SMALL, vague=1.0)
    texts = [proposer(seed)({"plan": "p"}, {"plan": records(task, "plan")}, ["plan"])["plan"] for seed in range(12)]
    assert texts == [
        proposer(seed)({"plan": "p"}, {"plan": records(task, "plan")}, ["plan"])["plan"] for seed in range(12)
    ]
    assert len(set(texts)) > 3


def test_the_proposer_survives_what_it_cannot_read() -> None:
    odd = [{"Inputs": {"numbers": "1 2 3 4"}, "Generated Outputs": "```", "Feedback": "Your output failed to parse."}]
    assert proposer()({"plan": "Do it."}, {"plan": odd}, ["plan"])["plan"].startswith("Do it.")
    assert proposer()({"plan": "Do it."}, {}, ["plan"])["plan"].startswith("Do it.")
