"""The program, one predictor that reasons, and the metric, which leaves the comparison to math_verify."""

import re
from typing import Any

import dspy

from dspy_fst.fast.latex_repair import repair_latex
from programs.common import judged
from programs.math.verifier import Verifier

NUMBER = re.compile(r"-?\d+(\.\d+)?(/\d+)?|-?\\d?frac\{\d+\}\{\d+\}")
UNDONE = re.compile(r"[+*^!]|\d\s*-\s*\d|\\times|\\cdot|\\d?binom")
"""Signs of a calculation that is still to be done."""

ENDS = " \t\r\n.,;:*`\N{IDEOGRAPHIC FULL STOP}"
"""What may stand round an answer without being a part of it. No "!": that is a factorial."""
WRAPPED = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        *(r"\$\$([^$]+)\$\$", r"\$([^$]+)\$", r"\\\((.+?)\\\)", r"\\\[(.+?)\\\]"),
        *(r"\\boxed\{([^{}]+)\}", r"\\text\{([^{}]+)\}", r'"([^"]+)"'),
    )
]
"""Marks round a whole answer."""
LEAD = re.compile(r"[A-Za-z][A-Za-z ,']*?(?:\b(?:is|equals)\b:?|:)\s+(?=[-\N{MINUS SIGN}+\d\\$(*\[])")
"""The beginning of a sentence that says the answer at once: "So the answer is"."""
UNIT = re.compile(
    r"(\s*(\N{DEGREE SIGN}|\^\{?\s*\\circ\s*\}?|\\degree)"
    r"|(?<=\d)\s+(square |cubic )?(units?|dollars?|cents?|euros?|pounds?|degrees?|radians?))$"
)
"""A unit after a number, which the expected answers do not have."""

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
    written = getattr(
        pred, "answer", None
    )  # as it is: a form feed at its beginning is what JSON left of a LaTeX command
    return judged(fault(gold.answer, "" if written is None else str(written)))


def bare(text: str) -> str:
    r"""The answer without what stands round it: marks of mathematics or Markdown, a sentence that says it.

    >>> bare("$\\boxed{1/2}$."), bare("**42.**"), bare("4, 5.")
    ('1/2', '42', '4, 5')
    """
    text, before = repair_latex(text), None
    while text != before:
        before = text
        text = text.strip().rstrip(ENDS).lstrip(" *`")
        text = text[lead.end() :] if (lead := LEAD.match(text)) else text
        text = next((found[1] for marks in WRAPPED if (found := marks.fullmatch(text))), text)
    return text


def fault(want: str, got: str) -> str | None:
    """What is wrong with an answer, as a sentence; None when it is right."""
    got = bare(got)
    if not UNIT.search(want):
        got = UNIT.sub("", got)
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
