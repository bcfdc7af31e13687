"""dspy.Refine asks the LM of DSPy's settings for its hints and goes on without them where there is none."""

import dspy
import pytest
from dspy.utils import DummyLM

from dspy_fst.preflight.unreachable_parts import part_warnings


class Solves(dspy.Module):
    def __init__(self):
        super().__init__()
        self.solve = dspy.Predict("question -> answer")

    def forward(self, question):
        return self.solve(question=question)


class Holds(dspy.Module):
    def __init__(self, kind):
        super().__init__()
        self.best = kind(Solves(), N=2, reward_fn=never, threshold=1.0)

    def forward(self, question):
        return self.best(question=question)


def never(inputs, prediction):
    return 0.0


@pytest.mark.parametrize(
    ("kind", "configured", "warned"),
    [(dspy.Refine, False, True), (dspy.Refine, True, False), (dspy.BestOfN, False, False)],
    ids=["refine", "refine with an adviser", "best of n"],
)
def test_a_refine_that_has_nobody_to_ask_is_warned_of(kind, configured, warned):
    with dspy.context(lm=DummyLM([]) if configured else None):
        warnings = part_warnings(Holds(kind))
    told = [
        warning
        for warning in warnings
        if warning.startswith("student: dspy.Refine at 'best' takes its hints from the LM")
    ]
    assert len(told) == len(warnings) == warned


def test_such_a_refine_answers_and_its_tries_hold_no_hint(capsys):
    program, lm = Holds(dspy.Refine), DummyLM([{"answer": "no"}] * 10)
    program.set_lm(lm)
    with dspy.context(lm=None, trace=[]):
        assert program(question="?").answer == "no"
        inputs = [asked for _, asked, _ in dspy.settings.trace]
    assert "No LM is loaded" in capsys.readouterr().out
    assert inputs == [{"question": "?"}]
