"""Almanac: find the note on a house of an invented town, then answer from it; the town has words of its own.

>>> task = build(train=4, val=2, test=2)
>>> sorted(task.trainset[0].labels().keys())
['answer', 'notes', 'place', 'query']
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

HOUSES = {
    "bakery": "Crumb",
    "school": "Slate",
    "prison": "Quiet",
    "inn": "Pillow",
    "mill": "Mill",
    "church": "Church",
    "smithy": "Smithy",
    "ferry": "Ferry",
}
"""What a stranger calls a house, and what the town does. Half of the words are the town's own."""
QUARTERS = (
    *("Elmrow", "Fennside", "Goosegate", "Larkhill", "Netherby", "Oxbrook", "Pennywell", "Rushford"),
    *("Saltmarsh", "Thornbury", "Underwood", "Westcliff"),
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
NOTE = "The {house} of {quarter} opens at {hour}. {builder} built it and it is painted {colour}."
KEPT = 2
"""Notes that a search gives; eight share a quarter, so its name alone finds the right one in one case of four."""
SHOWN = (
    ("Who built the tower of Kingsport?", "Tower", "Kingsport", "two", "Ines Hale", "red", "Ines Hale"),
    ("When does the market of Eastham open?", "Market", "Eastham", "four", "Bert Quill", "pink", "four"),
    ("What colour is the bridge of Dunmore?", "Bridge", "Dunmore", "three", "Olga Reed", "gold", "gold"),
)
"""Question, the facts of its note, answer. As demos they show the form, on houses that are not in the town."""
EXPERT = {
    "ask": "Write the name of the house. The bakery is called Crumb, the school Slate, the prison Quiet, the inn "
    "Pillow: for the bakery of Elmrow write Crumb of Elmrow.",
    "read": "Copy the answer from the notes: an hour, a name or a colour, and nothing else.",
}
"""What somebody who knows the town would tell each predictor."""


class Ask(dspy.Signature):
    """Write a query."""

    question: str = dspy.InputField()
    query: str = dspy.OutputField()


class Read(dspy.Signature):
    """Answer the question."""

    question: str = dspy.InputField()
    notes: list[str] = dspy.InputField()
    answer: str = dspy.OutputField()


class Almanac(dspy.Module):
    """question -> answer, with the query and the titles that it found."""

    def __init__(self, retriever: Retriever) -> None:
        super().__init__()
        self.retriever = retriever
        self.ask, self.read = dspy.Predict(Ask), dspy.Predict(Read)
        told = [_demo(*facts) for facts in SHOWN]
        self.ask.demos = [dspy.Example(question=demo.question, query=demo.query) for demo in told]
        self.read.demos = [dspy.Example(question=demo.question, notes=demo.notes, answer=demo.answer) for demo in told]

    def forward(self, question: str) -> dspy.Prediction:
        query = self.ask(question=question).query
        found = self.retriever.search(query, KEPT)
        notes = [shown(note) for note in found]
        answer = self.read(question=question, notes=notes).answer
        return dspy.Prediction(answer=answer, query=query, found=[note["title"] for note in found])


def metric(gold: Any, pred: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None) -> Any:
    """Half a point for the note that holds the answer, half for the answer; each predictor is told its own part."""
    found = gold.query in list(getattr(pred, "found", None) or [])
    right = normalize_text(said(pred, "answer")) == normalize_text(gold.answer)
    query = None if found else told("query", gold.query, said(pred, "query"), gold.place)
    answer = None if right else told("answer", gold.answer, said(pred, "answer"))
    of = {"ask": [query], "read": [answer]}.get(pred_name or "", [query, answer])
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


def _demo(question: str, house: str, quarter: str, hour: str, builder: str, colour: str, answer: str) -> dspy.Example:
    title = f"{house} of {quarter}"
    facts = {"title": title, "house": house, "quarter": quarter, "hour": hour, "builder": builder, "colour": colour}
    return dspy.Example(question=question, query=title, notes=[shown(note(facts))], answer=answer)


def shown(document: Document) -> str:
    """A note as the second predictor reads it."""
    return f"{document['title']} | {document['text']}"


def _town() -> list[dict[str, str]]:
    rng = random.Random("almanac")
    return [
        {
            "title": f"{house} of {quarter}",
            "place": f"{everyday} of {quarter}",
            "house": house,
            "quarter": quarter,
            "hour": rng.choice(HOURS),
            "builder": rng.choice(BUILDERS),
            "colour": rng.choice(COLOURS),
        }
        for quarter in QUARTERS
        for everyday, house in HOUSES.items()
    ]


def _questions(seed: int) -> Iterator[dspy.Example]:
    rng = random.Random(f"almanac-{seed}")
    asked = [(facts, fact) for facts in _town() for fact in QUESTIONS]
    rng.shuffle(asked)
    return iter(
        dspy.Example(
            question=rng.choice(QUESTIONS[fact]).format(facts["place"]),
            place=facts["place"],
            query=facts["title"],
            notes=[shown(note(facts))],
            answer=facts[fact],
        ).with_inputs("question")
        for facts, fact in asked
    )
