"""The program, one predictor that reasons, and the metric that reads a letter from the answer."""

import re
from typing import Any

import dspy

from programs.common import judged, said


class Answer(dspy.Signature):
    """Answer the multiple choice question."""

    question: str = dspy.InputField()
    choices: str = dspy.InputField()
    answer: str = dspy.OutputField(desc="the letter of the right choice")


class Choose(dspy.Module):
    """One predictor: question, choices -> answer."""

    def __init__(self) -> None:
        super().__init__()
        self.choose = dspy.ChainOfThought(Answer)

    def forward(self, question: str, choices: str) -> dspy.Prediction:
        return self.choose(question=question, choices=choices)


def metric(
    gold: Any, pred: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None
) -> dspy.Prediction:
    """1 for the right letter, else 0 and the right choice."""
    choices = dict(line.split(". ", 1) for line in gold.choices.split("\n"))
    got = said(pred, "answer")
    letter = chosen(got, choices)
    if letter == gold.answer:
        return judged(None)
    right = f"The right choice is {gold.answer}, {choices[gold.answer]}."
    if letter is None:
        return judged(f"No single choice can be read from {got[:200]!r}. {right}")
    return judged(f"The answer is {letter}, {choices[letter]}. {right}")


def chosen(text: str, choices: dict[str, str]) -> str | None:
    """The letter that an answer names: alone, marked as a letter, or by the text of a choice; None when unclear."""
    letters = "".join(choices)
    plain = re.sub(r"\\boxed\{(.*?)\}|[*$`]", r"\1", text).strip()
    for pattern in (
        rf"\(?([{letters}{letters.lower()}])\)?[.:,]?",  # B, (b), B.
        rf"\(?([{letters}])[).:](?:\s.*)?",  # B. 3 m/s
        rf".*\b[Aa]nswer(?: is)?:?\s*\(?([{letters}])(?:[).,:;].*)?",  # the answer is B
    ):
        if found := re.fullmatch(pattern, plain, re.DOTALL):
            return found[1].upper()
    named = [letter for letter, choice in choices.items() if choice == plain]
    return named[0] if len(named) == 1 else None
