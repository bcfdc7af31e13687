"""The laboratory's task: digits in, digits out, and the rule between them is to be found.

`project.yaml` names what is here. The rule is that of programs/lab/worlds/reverse_drop.py; neither the
program nor the proposer ever sees it.
"""

import sys
from typing import Any

import dspy

sys.path.append("$clone")  # the laboratory belongs to the clone; the installed package does not hold it

from programs.lab import FeedbackProposer
from programs.lab.world import describe_fault


class Rule(dspy.Signature):
    """Work out the answer from the numbers."""

    numbers: str = dspy.InputField()
    answer: str = dspy.OutputField()


class Solve(dspy.Module):
    """The program: one predictor. Its instruction is the signature's docstring, and is what the search improves."""

    def __init__(self) -> None:
        super().__init__()
        self.solve = dspy.Predict(Rule)

    def forward(self, numbers: str) -> dspy.Prediction:
        return self.solve(numbers=numbers)


def metric(
    gold: dspy.Example, pred: dspy.Prediction, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None
) -> dspy.Prediction:
    """1.0 for the right answer, else 0.0, and a sentence on what was wrong: that is what the proposer reads."""
    given = " ".join(str(pred.answer).split())
    return dspy.Prediction(
        score=float(given == gold.answer), feedback=describe_fault(gold.answer, given, shows_answer=True)
    )


propose = FeedbackProposer(seed=0)
"""Writes new instructions without a language model. It reads the sentences of describe_fault alone: with a metric that
says something else it learns nothing, which the run tells; name a reflection_lm then."""
