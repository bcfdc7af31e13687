"""A two-module program on the laboratory's base model, with a variable number of calls."""

import dspy

from dspy_fst import PolicyLM
from programs.lab import BASE
from programs.lab.tokenizer import signature


class Relay(dspy.Module):
    """Two modules; the first is called once to three times, as the problem's length says."""

    def __init__(self):
        super().__init__()
        self.first = dspy.Predict(signature("Reverse the list."))
        self.last = dspy.Predict(signature("Drop the last number."))

    def forward(self, numbers):
        text = numbers
        for _ in range(len(numbers.split()) - 3):
            text = self.first(numbers=text).answer
        return self.last(numbers=text)


def relay(engine="in_process"):
    """The program, speaking with the base model at a temperature at which groups differ."""
    program = Relay()
    # However busy the machine: batches are cut by who waits, never by the clock.
    options = {"linger_s": 60.0} if engine == "in_process" else {}
    program.set_lm(PolicyLM(BASE, engine=engine, max_tokens=12, temperature=1.5, engine_options=options))
    return program


def any_answer(gold, pred, trace=None, pred_name=None, pred_trace=None):
    """Rewards short answers: something that a group differs in."""
    return dspy.Prediction(score=1.0 / max(len(pred.answer), 1), feedback=f"{len(pred.answer)} characters")
