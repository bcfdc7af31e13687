"""The program, one predictor that reasons, and the metric, which leaves the comparison to math_verify."""

import re
from typing import Any

import dspy

from programs.common import judged, said
from programs.math.verifier import Verifier

NUMBER = re.compile(r"-?\d+(\.\d+)?(/\d+)?|-?\\d?frac\{\d+\}\{\d+\}")
UNDONE = re.compile(r"[+*^!]|\d\s*-\s*\d|\\times|\\cdot|\\d?binom")
"""Signs of a calculation that is still to be done."""

VERIFIER = Verifier()


class Answer(dspy.Signature):
    """Solve the problem."""

    problem: str = dspy.InputField()
    answer: str = dspy.OutputField(desc="the final result alone, as a number or in LaTeX")


class Solve(dspy.Module):
    """One predictor: problem -> answer."""

    def __init__(self) -> None:
        super().__init__()
        self.solve = dspy.ChainOfThought(Answer)

    def forward(self, problem: str) -> dspy.Prediction:
        return self.solve(problem=problem)


def metric(
    gold: Any, pred: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None
) -> dspy.Prediction:
    r"""1 for an equal result, plain or in \boxed{}, else 0 and the expected one."""
    return judged(fault(gold.answer, said(pred, "answer").strip("* ")))


def fault(want: str, got: str) -> str | None:
    """What is wrong with an answer, as a sentence; None when it is right."""
    if got == want:
        return None
    if not got:
        return f"There is no answer. Expected {want}."
    if NUMBER.fullmatch(want) and UNDONE.search(got):
        # math_verify holds 2+3 for 5, so repeating the problem would be rewarded
        return f"The answer {got[:200]} is not worked out. Expected {want}."
    same = VERIFIER.same(want, got)
    if same is None:
        return f"The answer {got[:200]} could not be checked in {VERIFIER.timeout_s:g} s. Expected {want}."
    return None if same else f"The answer is {got[:200]}. Expected {want}."
