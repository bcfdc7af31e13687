"""Reckon: plan a calculation on a list of digits, let a calculator do it, report the result, by a hidden rule."""

import random

import dspy

from programs.common import Task, drawn, split
from programs.lab.world import draw_digits
from programs.reckon.program import Metric, Reckon, calculate
from programs.reckon.skills import PLANS, REPORTS
from programs.tiny.skills import Skill

__all__ = ["build"]


def build(
    train: int = 512,
    val: int = 64,
    test: int = 128,
    seed: int = 0,
    *,
    plan: str = "first_two",
    report: str = "then_last",
    vague: float = 0.5,
) -> Task:
    """Draw different lists and the answers that a hidden rule gives them.

    Args:
        plan: What has to be calculated: a name in `skills.PLANS`.
        report: How the result has to be reported: a name in `skills.REPORTS`.
        vague: Share of the problems whose feedback hides what was expected.

    Raises:
        ValueError: no such plan or report.
    """
    planned, reported = _named(PLANS, plan, "plan"), _named(REPORTS, report, "report")
    sizes = (train, val, test)

    def draw(rng: random.Random) -> dspy.Example:
        numbers = draw_digits(rng)
        result = calculate(planned.act({"numbers": numbers}))
        answer = reported.act({"numbers": numbers, "result": result})
        return dspy.Example(numbers=numbers, result=result, answer=answer).with_inputs("numbers")

    metric = Metric(lambda numbers, result: reported.act({"numbers": numbers, "result": result}), vague)
    pool = drawn(draw, f"reckon-{plan}-{report}-{seed}", sizes)
    return Task(Reckon(), metric, *split([pool] * 3, sizes, key="numbers"))


def _named(skills: tuple[Skill, ...], name: str, what: str) -> Skill:
    found = [skill for skill in skills if skill.name == name]
    if not found:
        raise ValueError(f"{what}={name!r}: take one of {', '.join(skill.name for skill in skills)}")
    return found[0]
