"""An example to be replaced by your task: read a line of an order, write the warehouse's code for it.

`project.yaml` names what is here: the program, the metric, and a proposer that needs no LM.
"""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import dspy

WHOLE = "Write three parts with hyphens between them."
PARTS = (
    "The first part is one piece of the goods, in capitals.",
    "The second part is the amount in digits.",
    "The third part is the first three letters of the day, in capitals.",
)
"""What a code is, in the metric's words: the program has to find it out."""
RIGHT = "Right."


class OrderCode(dspy.Signature):
    """Write the code of the order."""

    order: str = dspy.InputField(desc="a line of an order")
    code: str = dspy.OutputField(desc="three parts with hyphens between them")


class Coder(dspy.Module):
    """The program: one predictor. Its instruction is the signature's docstring, and is what the search improves."""

    def __init__(self) -> None:
        super().__init__()
        self.write = dspy.Predict(OrderCode)

    def forward(self, order: str) -> dspy.Prediction:
        return self.write(order=order)


def metric(
    gold: dspy.Example, pred: dspy.Prediction, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None
) -> dspy.Prediction:
    """The share of the three parts that are right, and a line on each one that is not."""
    wanted, given = gold.code.split("-"), str(pred.code).strip().split("-")
    if len(given) != len(wanted):
        return dspy.Prediction(score=0.0, feedback=f"{WHOLE}\nExpected {gold.code}")
    faults = [PARTS[i] for i in range(len(wanted)) if given[i] != wanted[i]]
    feedback = "\n".join([*faults, f"Expected {gold.code}"]) if faults else RIGHT
    return dspy.Prediction(score=1 - len(faults) / len(wanted), feedback=feedback)


def propose(
    candidate: Mapping[str, str],
    reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
    components_to_update: Sequence[str],
) -> dict[str, str]:
    """A simple stand-in for a reflection LM: append what the feedback says most often.

    It reads the lines of the metric above alone (WHOLE and PARTS), and warns where it finds none of them.
    """
    texts = {}
    for name in components_to_update:
        text = candidate[name]
        lines = Counter(line for record in reflective_dataset[name] for line in str(record["Feedback"]).splitlines())
        if lines and not any(line in (WHOLE, *PARTS, RIGHT) for line in lines):
            warnings.warn(
                f"propose could not read the feedback {next(iter(lines))[:160]!r}: it knows only the lines WHOLE and "
                "PARTS of my_program.py. Change propose together with the metric, or name a reflection_lm in "
                "project.yaml",
                stacklevel=2,
            )
        news = [line for line, _ in lines.most_common() if line in (WHOLE, *PARTS) and line not in text]
        texts[name] = " ".join([text, *news[:1]])
    return texts
