"""Almanac: find the note on a house of an invented town, then answer from it; the town calls a house by its sign.

>>> task = build(train=4, val=2, test=2)
>>> sorted(task.trainset[0].labels().keys())
['answer', 'house', 'notes', 'sign', 'title']
"""

import random
from collections.abc import Iterator, Mapping
from typing import Any

import dspy
from dspy.evaluate import normalize_text

from programs.common import Task, said, split
from programs.hover.retrieval import Retriever
from programs.hover.world import Document
from programs.language.feedback import told

SIGNS = {"bakery": "crown", "school": "rose", "prison": "lion", "mill": "swan"}
"""What a stranger calls a house -> the sign by which the town knows it. The notes say the sign alone."""
QUARTERS = (
    *("Elmrow", "Fennside", "Goosegate", "Larkhill", "Netherby", "Oxbrook", "Pennywell", "Rushford"),
    *("Saltmarsh", "Thornbury", "Underwood", "Westcliff", "Ashcombe", "Bridgend", "Coldwater", "Dovecote"),
    *("Foxholm", "Greenhaugh", "Highmoor", "Ivybank", "Kelsey", "Millbeck", "Northam", "Ravensworth"),
)
HOURS = ("five", "six", "seven", "eight", "nine", "ten", "eleven", "noon")
COLOURS = ("green", "yellow", "white", "blue", "brown", "grey", "black", "orange")
BUILDERS = (
    *("Orla Venn", "Piet Aldous", "Runa Marsh", "Silas Crane", "Tilda Moss", "Ulric Dane", "Vera Holt", "Wim Ashby"),
    *("Xenia Ford", "Yorick Penn", "Zelda Birch", "Abel Thorn"),
)
QUESTIONS = {
    "hour": ("When does the {} open?", "At what hour does the {} open its door?"),
    "builder": ("Who built the {}?", "By whom was the {} built?"),
    "colour": ("What colour is the {}?", "In what colour is the {} painted?"),
}
NOTE = "The {sign} of {quarter} opens at {hour}. {builder} built it and it is painted {colour}."
KEPT = 1
"""Notes that a search gives; four share a quarter, so its name alone finds the right one in one case of four."""
SHOWN = (
    ("Who built the tower of Kingsport?", "tower", "crown", "Kingsport", "two", "Ines Hale", "red", "Ines Hale"),
    ("When does the market of Eastham open?", "market", "rose", "Eastham", "four", "Bert Quill", "pink", "four"),
)
"""Question, house, the facts of its note, answer. As demos they show the form, on houses that are not in the town."""
EXPERT = {
    "ask": "Write the house and its sign. "
    + " ".join(f"When it says {house}, the sign is {SIGNS[house]}." for house in SIGNS),
    "read": "Copy the answer from the notes.",
}
"""What somebody who knows the town would tell each predictor."""


class Ask(dspy.Signature):
    """Write the house and its sign."""

    question: str = dspy.InputField()
    house: str = dspy.OutputField()
    sign: str = dspy.OutputField()


class Read(dspy.Signature):
    """Answer the question."""

    question: str = dspy.InputField()
    notes: list[str] = dspy.InputField()
    answer: str = dspy.OutputField()


class Almanac(dspy.Module):
    """question -> answer, with the sign that it searched for and the titles that it found."""

    def __init__(self, retriever: Retriever) -> None:
        super().__init__()
        self.retriever = retriever
        self.ask, self.read = dspy.Predict(Ask), dspy.Predict(Read)
        shown = [_demo(*facts) for facts in SHOWN]
        self.ask.demos = [dspy.Example(question=demo.question, house=demo.house, sign=demo.sign) for demo in shown]
        self.read.demos = [dspy.Example(question=demo.question, notes=demo.notes, answer=demo.answer) for demo in shown]

    def forward(self, question: str) -> dspy.Prediction:
        sign = self.ask(question=question).sign
        found = self.retriever.search(f"{sign} {question}", KEPT)
        answer = self.read(question=question, notes=[note["text"] for note in found]).answer
        return dspy.Prediction(answer=answer, sign=sign, found=[note["title"] for note in found])


def metric(gold: Any, pred: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None) -> Any:
    """Half a point for the note that holds the answer, half for the answer; each predictor is told its own part."""
    found = gold.title in list(getattr(pred, "found", None) or [])
    right = normalize_text(said(pred, "answer")) == normalize_text(gold.answer)
    sign = None if found else told("sign", gold.sign, said(pred, "sign"), gold.house)
    answer = None if right else told("answer", gold.answer, said(pred, "answer"))
    of = {"ask": [sign], "read": [answer]}.get(pred_name or "", [sign, answer])
    faults = [fault for fault in of if fault]
    return dspy.Prediction(score=(found + right) / 2, feedback=" ".join(["Wrong.", *faults]) if faults else "Correct.")


def build(train: int = 64, val: int = 32, test: int = 96, seed: int = 0) -> Task:
    """Questions, each on one fact of one house; the notes are the same for every seed.

    An example holds what each predictor should have read and written, so that a warm start can learn from it.

    Raises:
        ValueError: more questions were asked for than there are, 288.
    """
    pool = _questions(seed)
    program = Almanac(Retriever.over(corpus()))
    return Task(program, metric, *split([pool] * 3, (train, val, test), key="question"))


def corpus() -> list[Document]:
    """96 notes, one on each house of each quarter."""
    return [note(facts) for facts in _town()]


def note(facts: Mapping[str, str]) -> Document:
    """What the almanac says of one house."""
    return Document(title=facts["title"], text=NOTE.format(**facts))


def _demo(
    question: str, house: str, sign: str, quarter: str, hour: str, builder: str, colour: str, answer: str
) -> dspy.Example:
    text = NOTE.format(sign=sign, quarter=quarter, hour=hour, builder=builder, colour=colour)
    return dspy.Example(question=question, house=house, sign=sign, notes=[text], answer=answer)


def _town() -> list[dict[str, str]]:
    rng = random.Random("almanac")
    return [
        {
            "title": f"{sign} of {quarter}",
            "house": house,
            "sign": sign,
            "quarter": quarter,
            "hour": rng.choice(HOURS),
            "builder": rng.choice(BUILDERS),
            "colour": rng.choice(COLOURS),
        }
        for quarter in QUARTERS
        for house, sign in SIGNS.items()
    ]


def _questions(seed: int) -> Iterator[dspy.Example]:
    rng = random.Random(f"almanac-{seed}")
    asked = [(facts, fact) for facts in _town() for fact in QUESTIONS]
    rng.shuffle(asked)
    return iter(
        dspy.Example(
            question=rng.choice(QUESTIONS[fact]).format(f"{facts['house']} of {facts['quarter']}"),
            house=facts["house"],
            sign=facts["sign"],
            title=facts["title"],
            notes=[note(facts)["text"]],
            answer=facts[fact],
        ).with_inputs("question")
        for facts, fact in asked
    )
