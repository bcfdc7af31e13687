"""Slips: an order, written in a sentence, into four typed fields, as one shop writes them.

>>> task = build(train=4, val=2, test=2)
>>> sorted(task.trainset[0].labels().keys())
['bin', 'count', 'item', 'who']
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
BINS = {"candles": "red", "bottles": "blue", "apples": "green", "pencils": "white"}
"""The shop's rule: an item -> the colour of its bin."""
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
SENTENCES = (
    "On {day} {first} {last} ordered {count} {item}.",
    "{first} {last} wants {count} {item} on {day}.",
    "We heard that {first} {last} needs {count} {item} by {day}.",
    "This {day} {first} {last} asked us to bring {count} {item}.",
)
"""Each names a person with both names, a number, an item and a day."""
SCORED = ("who", "count", "bin")
DEMOS = (
    {"note": "Mister Dahl needs 7 lamps by Sunday.", "who": "Dahl", "count": 7, "item": "lamps", "bin": "red"},
    {"note": "Send 30 spoons to Madam Kern on Sunday.", "who": "Kern", "count": 30, "item": "spoons", "bin": "blue"},
)
"""They show the form: one name each, and items that are in no note."""
EXPERT = {"fill": "Fill in the slip. " + " ".join(f"When it says {item}, the bin is {BINS[item]}." for item in BINS)}
"""What somebody who knows the rules would tell the predictor. That `who` is the last name alone is left to the demos:
told so too, this model gets more names wrong."""


class Slip(dspy.Signature):
    """Fill in the slip."""

    note: str = dspy.InputField()
    who: str = dspy.OutputField()
    count: int = dspy.OutputField()
    item: str = dspy.OutputField()
    bin: str = dspy.OutputField()


class Slips(dspy.Module):
    """note -> who, count, item, bin, with one call."""

    def __init__(self) -> None:
        super().__init__()
        self.fill = dspy.Predict(Slip)
        self.fill.demos = [dspy.Example(**demo) for demo in DEMOS]

    def forward(self, note: str) -> dspy.Prediction:
        return self.fill(note=note)


def metric(gold: Any, pred: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None) -> Any:
    """1 for a slip that is right in name, number and bin, else 0; the feedback shows each fault."""
    faults = [
        told(field, gold[field], said(pred, field), gold["item"] if field == "bin" else None)
        for field in SCORED
        if said(pred, field) != str(gold[field])
    ]
    return dspy.Prediction(score=float(not faults), feedback=" ".join(["Wrong.", *faults]) if faults else "Correct.")


def build(train: int = 64, val: int = 32, test: int = 96, seed: int = 0) -> Task:
    """Orders; a note is one sentence, and no two are alike.

    Raises:
        ValueError: more notes were asked for than there are.
    """
    sizes = (train, val, test)
    pool = drawn(_draw, f"slips-{seed}", sizes)
    return Task(Slips(), metric, *split([pool] * 3, sizes, key="note"))


def _draw(rng: random.Random) -> dspy.Example:
    item, last, count = rng.choice(tuple(BINS)), rng.choice(LAST), rng.randint(11, 60)
    first, day = rng.choice(FIRST), rng.choice(DAYS)
    note = rng.choice(SENTENCES).format(first=first, last=last, count=count, item=item, day=day)
    return dspy.Example(note=note, who=last, count=count, item=item, bin=BINS[item]).with_inputs("note")
