"""The program, two predictors of one signature, and the metric that tells each of them its part of the fault."""

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dspy

from programs.common import said
from programs.lab.tokenizer import signature
from programs.lab.world import describe_fault

LIST = re.compile(r"\d( \d)*")


class Relay(dspy.Module):
    """What the first predictor answers is the second one's problem: numbers -> answer, with what was handed on."""

    def __init__(self, instruction: str) -> None:
        super().__init__()
        self.first = dspy.Predict(signature(instruction))
        self.second = dspy.Predict(signature(instruction))

    def forward(self, numbers: str) -> dspy.Prediction:
        handed_on = self.first(numbers=numbers).answer
        return dspy.Prediction(answer=self.second(numbers=handed_on).answer, handed_on=handed_on)


@dataclass(frozen=True)
class Metric:
    """Score 1 for the right answer, else 0; each predictor is told of its own part, never of the operation."""

    first: Callable[[str], str]
    """What should be handed on, e.g. "1 2 3" -> "2 3 1"."""
    second: Callable[[str], str]
    """What should be made of whatever was handed on."""
    vague: float = 0.5
    """Share of the problems whose feedback hides what was expected; which ones is fixed by the problem's text."""

    def __call__(
        self, gold: Any, pred: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None
    ) -> dspy.Prediction:
        handed_on, answer = (" ".join(said(pred, name).split()) for name in ("handed_on", "answer"))
        shows = zlib.crc32(gold.numbers.encode()) % 100 >= 100 * self.vague
        told = {
            "first": lambda: describe_fault(self.first(gold.numbers), handed_on, shows),
            "second": lambda: self._of_second(handed_on, answer, shows),
        }
        names = [pred_name] if pred_name in told else list(told)
        score = float(answer == gold.answer)
        return dspy.Prediction(score=score, feedback=" ".join(told[name]() for name in names))

    def _of_second(self, handed_on: str, answer: str, shows: bool) -> str:
        """Judged by what it was given, right or wrong."""
        if not LIST.fullmatch(handed_on):
            return f"It was handed {handed_on[:60]!r}, which is no list."
        return describe_fault(self.second(handed_on), answer, shows)
