"""The program, two predictors around a calculator, and the metric that tells each of them its part of the fault."""

import ast
import operator
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dspy

from programs.common import said

LONGEST = 60
"""Characters of a calculation; a tower of products would otherwise take for ever."""
NOTHING = "none"
"""What the calculator says of something that is no calculation."""

_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


class Plan(dspy.Signature):
    """Write the calculation that the numbers need."""

    numbers: str = dspy.InputField()
    calculation: str = dspy.OutputField()


class Report(dspy.Signature):
    """Write the answer."""

    numbers: str = dspy.InputField()
    result: str = dspy.InputField()
    answer: str = dspy.OutputField()


class Reckon(dspy.Module):
    """Plan a calculation, have it done by a tool, report: numbers -> answer, with calculation and result."""

    def __init__(self) -> None:
        super().__init__()
        self.plan = dspy.Predict(Plan)
        self.report = dspy.Predict(Report)

    def forward(self, numbers: str) -> dspy.Prediction:
        calculation = self.plan(numbers=numbers).calculation
        result = calculate(calculation)
        answer = self.report(numbers=numbers, result=result).answer
        return dspy.Prediction(answer=answer, calculation=calculation, result=result)


def calculate(text: str) -> str:
    """The tool: the value of whole numbers joined by +, - and *, e.g. "3 + 4 * 2"; NOTHING for anything else."""
    try:
        return (
            str(_value(ast.parse(text.strip()[: LONGEST + 1], mode="eval").body)) if len(text) <= LONGEST else NOTHING
        )
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return NOTHING


def _value(node: ast.AST) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("no calculation")


@dataclass(frozen=True)
class Metric:
    """Score 1 for the right answer, else 0; each predictor is told of its own part, never the rule behind it."""

    answer: Callable[[str, str], str]
    """(numbers, result) -> answer."""
    vague: float = 0.5
    """Share of the problems whose feedback hides what was expected; which ones is fixed by the problem's text."""

    def __call__(
        self, gold: Any, pred: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None
    ) -> dspy.Prediction:
        score = float(_tidy(said(pred, "answer")) == gold.answer)
        told = {"plan": self._of_plan, "report": self._of_report}
        names = [pred_name] if pred_name in told else list(told)
        parts = [told[name](gold, pred, zlib.crc32(gold.numbers.encode()) % 100 >= 100 * self.vague) for name in names]
        return dspy.Prediction(score=score, feedback=" ".join(["Correct." if score else "Wrong.", *parts]))

    def _of_plan(self, gold: Any, pred: Any, shown: bool) -> str:
        got = said(pred, "result")
        if got == gold.result:
            return "The calculation is right."
        if got in (NOTHING, ""):
            return f"{said(pred, 'calculation')[:60]!r} is no calculation."
        if shown:
            return f"The calculation comes to {got}; it should come to {gold.result}."
        return f"The calculation comes to {got}, which is too {'small' if int(got) < int(gold.result) else 'large'}."

    def _of_report(self, gold: Any, pred: Any, shown: bool) -> str:
        result, got = said(pred, "result"), _tidy(said(pred, "answer"))
        want = self.answer(gold.numbers, result)
        if got == want:
            return f"For the result {result} the answer is right."
        if shown:
            return f"For the result {result} the answer should be {want}; it is {got[:60]}."
        short, long = len(got.split()) < len(want.split()), len(got.split()) > len(want.split())
        kind = "too few numbers" if short else "too many numbers" if long else "a wrong number"
        return f"For the result {result} the answer has {kind}."


def _tidy(text: str) -> str:
    return " ".join(text.split())
