"""Desk: which desk of an inn sees to the thing that a guest writes about, by the house's rules.

>>> task = build(train=4, val=2, test=2)
>>> sorted(task.trainset[0].labels().keys())
['desk', 'thing']
"""

from collections.abc import Iterator
from typing import Any

import dspy

from programs.common import Task, said
from programs.language.deal import deal
from programs.language.feedback import told

PLAIN = {"soup": "kitchen", "rose": "garden"}
"""Thing -> its desk, as anybody would guess."""
RULES = {"mule": "office", "letter": "stable"}
"""The house rules: half of the things. Each desk sees to one thing, so none is right for more than a quarter."""
MESSAGE = "{} the {} {}."
ACTS = (
    *("Please see to", "I asked for", "We spoke of", "I paid for", "I saw", "Nobody brought", "We lost", "I want"),
    *("We heard about", "They forgot"),
)
WHEN = (
    *("this morning", "last night", "on Sunday", "at noon", "again", "today", "yesterday", "as you said"),
    *("on Monday", "two days ago"),
)
"""No noun but the thing's stands before its time: the small model often takes another noun for the thing."""
DEMOS = (
    {"message": "The eggs were hard.", "thing": "eggs", "desk": "kitchen"},
    {"message": "A bush has died.", "thing": "bush", "desk": "garden"},
)
"""They show the form; no house rule touches them."""
EXPERT = {
    "route": "Write the desk. "
    + " ".join(f"When it says {thing}, the desk is {desk}." for thing, desk in {**PLAIN, **RULES}.items())
}
"""What somebody who knows the rules would tell the predictor."""


class Route(dspy.Signature):
    """Write the desk."""

    message: str = dspy.InputField()
    thing: str = dspy.OutputField()
    desk: str = dspy.OutputField()


class Desk(dspy.Module):
    """message -> thing and desk, with one call. The thing is said first: the small model can then look its desk up."""

    def __init__(self) -> None:
        super().__init__()
        self.route = dspy.Predict(Route)
        self.route.demos = [dspy.Example(**demo) for demo in DEMOS]

    def forward(self, message: str) -> dspy.Prediction:
        return self.route(message=message)


def metric(gold: Any, pred: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None) -> Any:
    """1 for the desk, else 0; the feedback names the word of the message that decided it, not the rule."""
    desk = said(pred, "desk")
    if desk == gold.desk:
        return dspy.Prediction(score=1.0, feedback="Correct.")
    return dspy.Prediction(score=0.0, feedback=f"Wrong. {told('desk', gold.desk, desk, gold.thing)}")


def build(train: int = 64, val: int = 32, test: int = 96, seed: int = 0) -> Task:
    """Messages of one sentence, no two alike; the things take turns.

    Raises:
        ValueError: more messages were asked for than there are, 400.
    """
    messages = _messages(seed)
    try:
        sets = [[next(messages) for _ in range(size)] for size in (train, val, test)]
    except RuntimeError as fault:  # what a generator makes of the StopIteration of a deck
        raise ValueError(f"{train + val + test} messages: the sentences do not last for so many") from fault
    return Task(Desk(), metric, *sets)


def _messages(seed: int) -> Iterator[dspy.Example]:
    desks = {**PLAIN, **RULES}
    decks = {thing: deal(f"{thing}-{seed}", MESSAGE, ACTS, (thing,), WHEN) for thing in desks}
    while True:
        for thing, desk in desks.items():
            yield dspy.Example(message=next(decks[thing]), thing=thing, desk=desk).with_inputs("message")
