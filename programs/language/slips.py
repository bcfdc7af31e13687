"""Slips: an order, written in a sentence, into three typed fields, as one shop writes them.

>>> task = build(train=4, val=2, test=2)
>>> sorted(task.trainset[0].labels().keys())
['count', 'day', 'who']
"""

import random
from typing import Any

import dspy

from programs.common import Task, drawn, said, split
from programs.language.feedback import told

FIRST = ("Anna", "Bruno", "Celia", "Dario", "Edith", "Felix", "Greta", "Hugo", "Irma", "Jonas", "Karla", "Lukas")
LAST = (
    *("Berg", "Falk", "Holm", "Lund", "Stone", "Winter", "Marsh", "Brook", "Frost", "Hill", "Rose", "Wood"),
    *("Baker", "Carter", "Miller", "Porter"),
)
PACKED = (
    *(("boxes", "candles"), ("crates", "bottles"), ("bags", "apples"), ("baskets", "eggs"), ("tins", "biscuits")),
    *(("bundles", "pencils"), ("trays", "cups"), ("sacks", "potatoes")),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
SENTENCES = (
    "On {asked} {first} {last} ordered {packs} {pack} of {pieces} {piece} for {due}.",
    "{first} {last} wrote on {asked} and wants {packs} {pack} of {pieces} {piece} on {due}.",
    "We heard on {asked} that {first} {last} needs {packs} {pack} of {pieces} {piece} by {due}.",
    "This {asked} {first} {last} asked us to bring {packs} {pack} of {pieces} {piece} on {due}.",
)
"""Each names a person with both names, two numbers and two days, in this order."""
FIELDS = ("who", "count", "day")
DEMOS = (
    {"note": "Mister Dahl needs 7 lamps by Sunday.", "who": "Dahl", "count": 7, "day": "Sunday"},
    {"note": "Send 30 spoons to Madam Kern on Sunday.", "who": "Kern", "count": 30, "day": "Sunday"},
    {"note": "On Sunday we bring 12 chairs to Doctor Voss.", "who": "Voss", "count": 12, "day": "Sunday"},
    {"note": "Captain Thal wants 25 ropes on Sunday.", "who": "Thal", "count": 25, "day": "Sunday"},
)
"""They show the form. One name, one number and one day each: nothing of the shop's rules."""
EXPERT = {
    "fill": "Fill in the slip. who is the last name alone: for Anna Berg write Berg. count is the second number, after "
    "of: for 3 boxes of 40 write 40. day is the last day in the note."
}
"""What somebody who knows the rules would tell the predictor."""


class Slip(dspy.Signature):
    """Fill in the slip."""

    note: str = dspy.InputField()
    who: str = dspy.OutputField()
    count: int = dspy.OutputField()
    day: str = dspy.OutputField()


class Slips(dspy.Module):
    """note -> who, count, day, with one call."""

    def __init__(self) -> None:
        super().__init__()
        self.fill = dspy.Predict(Slip)
        self.fill.demos = [dspy.Example(**demo) for demo in DEMOS]

    def forward(self, note: str) -> dspy.Prediction:
        return self.fill(note=note)


def metric(gold: Any, pred: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None) -> Any:
    """A third of a point for each field that is written as the shop writes it."""
    faults = [told(field, gold[field], said(pred, field)) for field in FIELDS if said(pred, field) != str(gold[field])]
    score = 1 - len(faults) / len(FIELDS)
    return dspy.Prediction(score=score, feedback=" ".join(["Wrong.", *faults]) if faults else "Correct.")


def build(train: int = 64, val: int = 32, test: int = 96, seed: int = 0) -> Task:
    """Orders; a note is one sentence, and no two are alike.

    Raises:
        ValueError: more notes were asked for than there are.
    """
    sizes = (train, val, test)
    pool = drawn(_draw, f"slips-{seed}", sizes)
    return Task(Slips(), metric, *split([pool] * 3, sizes, key="note"))


def _draw(rng: random.Random) -> dspy.Example:
    pack, piece = rng.choice(PACKED)
    asked, due = rng.sample(DAYS, 2)
    last, packs, pieces = rng.choice(LAST), rng.randint(2, 9), rng.randint(11, 60)
    note = rng.choice(SENTENCES).format(
        first=rng.choice(FIRST), last=last, packs=packs, pack=pack, pieces=pieces, piece=piece, asked=asked, due=due
    )
    return dspy.Example(note=note, who=last, count=pieces, day=due).with_inputs("note")
