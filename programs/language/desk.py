"""Desk: which desk of an inn a guest's message goes to, by house rules that overrule what the message is about.

>>> task = build(train=4, val=2, test=2)
>>> sorted(task.trainset[0].labels().keys())
['desk', 'mattered']
"""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import dspy

from programs.common import Task, said
from programs.language.deal import deal
from programs.language.feedback import told

DESKS = ("kitchen", "garden", "stable", "office")
ABOUT = {
    "kitchen": (
        "The {} {} {} {}.",
        ("soup", "bread", "fish", "porridge", "cake", "stew", "pudding"),
        ("was", "seemed", "tasted"),
        ("too salty", "cold", "burnt", "very good", "a little dry"),
        ("last night", "at noon", "on Sunday", "this morning", "at supper"),
    ),
    "garden": (
        "The {} {} {} {}.",
        ("roses", "apple trees", "hedges", "tulips", "plum trees", "lilies", "vines"),
        ("by the gate", "behind the house", "along the wall", "near the pond"),
        ("need water", "must be cut", "have lost their leaves", "look very fine"),
        ("again", "these days", "this year", "I think"),
    ),
    "stable": (
        "{} {} {} {}.",
        ("My horse", "My pony", "My mule", "Our old mare", "Our donkey", "My grey foal"),
        ("needs", "would like", "must have", "is waiting for"),
        ("fresh hay", "a dry stall", "new shoes", "some oats", "a warm blanket"),
        ("today", "tonight", "before we ride on", "when we come"),
    ),
    "office": (
        "{} {} {} {}.",
        ("The key", "The lock", "The lamp", "My letter", "The guest book", "The bell"),
        ("is not", "was not", "should be"),
        ("in the room", "by the door", "on the table", "where I left it", "upstairs"),
        ("today", "since Monday", "as you said", "any more"),
    ),
}
"""Desk -> sentences that are about it: a template and what goes into its gaps."""
CUES = {
    "crowns": (
        "{} {} {} crowns.",
        ("The price was", "Your letter says", "My neighbour paid", "We agreed on", "I was asked for", "I have sent"),
        ("only", "exactly", "about", "more than", "at least"),
        ("forty", "ninety", "twelve", "sixty", "seventy", "eighty", "thirty"),
    ),
    "child": (
        "{} {} child {}.",
        ("We travel with", "I write for", "Please think of", "I bring", "There will be"),
        ("a small", "one", "my brother's", "a sleepy", "our youngest", "a shy", "a merry"),
        ("this time", "as before", "from Tuesday on", "in the red room", "for two nights", "of six years"),
    ),
}
"""Words that decide the desk, whatever else a message is about -> sentences with them."""
SENDS = {"crowns": "stable", "child": "garden"}
"""The house rules. The groom of this inn keeps the purse, and the gardener minds the children."""
PLAIN = (
    "{} {} {}.",
    ("I write", "We write", "My father writes", "My wife asks me to write", "I send this note"),
    ("again", "with thanks", "in haste", "from the north", "on the road", "by lamplight"),
    ("this morning", "as ever", "with kind wishes", "before the winter", "and hope you are well", "and wait for word"),
)
"""Sentences that decide nothing."""
CYCLE = ("crowns", "", "child", "")
"""What the second sentences of messages hold, in turns: half of them decide the desk."""
COMMON = {"kitchen": 3, "garden": 1, "stable": 1, "office": 3}
"""How often messages without such words are about each desk. So no desk gets more than a third of all messages, and an
answer that is always the same is worth no more than that."""
DEMOS = (
    {"message": "The eggs were hard.", "desk": "kitchen"},
    {"message": "A bush has died.", "desk": "garden"},
    {"message": "May my goat sleep here?", "desk": "stable"},
    {"message": "Where do I leave my key?", "desk": "office"},
)
"""They show the form and the four desks; no house rule touches them."""
EXPERT = {
    "route": "Say which desk a message goes to. When it says crowns, the desk is stable. When it says child, the desk "
    "is garden."
}
"""What somebody who knows the rules would tell the predictor."""


class Route(dspy.Signature):
    """Say which desk a message goes to."""

    message: str = dspy.InputField()
    desk: str = dspy.OutputField()


class Desk(dspy.Module):
    """message -> desk, with one call."""

    def __init__(self) -> None:
        super().__init__()
        self.route = dspy.Predict(Route)
        self.route.demos = [dspy.Example(**demo) for demo in DEMOS]

    def forward(self, message: str) -> dspy.Prediction:
        return self.route(message=message)


def metric(gold: Any, pred: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None) -> Any:
    """1 for the desk, else 0; the feedback names the words of the message that decided it, not the rule."""
    desk = said(pred, "desk")
    if desk == gold.desk:
        return dspy.Prediction(score=1.0, feedback="Correct.")
    return dspy.Prediction(score=0.0, feedback=f"Wrong. {told('desk', gold.desk, desk, gold.mattered)}")


def build(train: int = 64, val: int = 32, test: int = 96, seed: int = 0) -> Task:
    """Messages of two sentences; no sentence stands in two messages.

    Raises:
        ValueError: the sentences do not last for so many messages.
    """
    messages = _messages(seed)
    try:
        sets = [[next(messages) for _ in range(size)] for size in (train, val, test)]
    except RuntimeError as fault:  # what a generator makes of the StopIteration of a deck
        raise ValueError(f"{train + val + test} messages: the sentences do not last for so many") from fault
    return Task(Desk(), metric, *sets)


def _messages(seed: int) -> Iterator[dspy.Example]:
    about = {desk: deal(f"{desk}-{seed}", *phrases) for desk, phrases in ABOUT.items()}
    second = {cue: deal(f"{cue}-{seed}", *phrases) for cue, phrases in {**CUES, "": PLAIN}.items()}
    rng = random.Random(f"desk-{seed}")
    for cue in itertools.cycle(CYCLE):
        ruled = SENDS.get(cue)
        topics = {desk: 1 for desk in ABOUT if desk != ruled} if ruled else COMMON
        (topic,) = rng.choices(tuple(topics), tuple(topics.values()))
        first = next(about[topic])
        message = f"{first} {next(second[cue])}"
        gold = {"desk": ruled or topic, "mattered": cue or first.rstrip(".")}
        yield dspy.Example(message=message, **gold).with_inputs("message")
