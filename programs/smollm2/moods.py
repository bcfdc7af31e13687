"""A task in the reach of a small language model: is the writer of a sentence happy or sad?

One predictor, sentences and labels of our own. What it is for: a real model that gets some rewards at the start and not
all of them. It measures nothing about language.

>>> task = build(demos=2)
>>> len(task.program.tell.demos), task.trainset[0].mood
(2, 'happy')
"""

from collections.abc import Sequence
from typing import Any, Literal

import dspy

from programs.common import Task, judged, said

MOODS = ("happy", "sad")
HAPPY = (
    "My sister called to say that she is coming home tomorrow.",
    "We won the match in the last minute and everybody sang.",
    "The doctor says my leg has healed and I can run again.",
    "Our garden is full of roses this year, I love it.",
    "I passed my exam with the best mark of the class.",
    "The cake turned out wonderful and the children laughed.",
    "He asked me to dance and we danced all night.",
    "At last the sun is out, what a lovely morning!",
    "My old friend wrote me a long and kind letter.",
    "They gave me the job that I always wanted.",
    "The baby smiled at me for the first time today.",
    "We found our lost cat safe and well in the barn.",
    "What a great concert, I could not stop clapping.",
    "Grandmother is well again and tells jokes all day.",
    "The soup was delicious and the waiter was very nice.",
    "I have holidays now and the sea is warm.",
    "My picture was chosen for the wall of the school.",
    "The neighbours brought us fresh bread, how kind of them.",
)
SAD = (
    "My dog died last night and the house is so quiet.",
    "We lost the match and nobody said a word.",
    "The doctor says I will never run again.",
    "The storm broke all my roses, I could cry.",
    "I failed my exam for the third time.",
    "The cake burned and the children cried.",
    "He left without a word and I miss him.",
    "It rains and rains, what a terrible morning.",
    "My old friend has forgotten me, no letter came.",
    "They took away the job that I always wanted.",
    "The baby is ill and I am so worried.",
    "Our cat has been gone for weeks, we gave up hope.",
    "What an awful concert, people left in tears.",
    "Grandmother is in hospital and knows nobody any more.",
    "The soup was cold and the waiter shouted at us.",
    "My holidays are over and I feel so alone.",
    "Nobody chose my picture and I tore it up.",
    "The neighbours are moving away, we will miss them.",
)
DEMOS = (
    ("The train was late and I missed my mother's birthday.", "sad"),
    ("We are going to the circus and I cannot wait!", "happy"),
)
"""In no set."""
WRONG = "The writer is {}, and the answer was {!r}."


HINTS = (
    "Good news, thanks and fun mean happy; a loss, an illness, a failure or worry means sad.",
    "Think of how the writer feels, not of how you would feel.",
    "Answer with one word, happy or sad, and nothing else.",
)


class Mood(dspy.Signature):
    """Say whether the writer of the sentence is happy or sad."""

    sentence: str = dspy.InputField()
    mood: Literal["happy", "sad"] = dspy.OutputField()


class Moods(dspy.Module):
    """sentence -> mood, with one call."""

    def __init__(self) -> None:
        super().__init__()
        self.tell = dspy.Predict(Mood)

    def forward(self, sentence: str) -> dspy.Prediction:
        return self.tell(sentence=sentence)


def metric(gold: Any, pred: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None) -> Any:
    """1 for the label, else 0."""
    mood = said(pred, "mood")
    return judged(None if mood == gold.mood else WRONG.format(gold.mood, mood))


def build(*, demos: int = 0, train: int = 24, val: int = 6, test: int = 6) -> Task:
    """The task; each set has as many happy sentences as sad ones, in turns.

    Args:
        demos: How many worked examples the predictor shows, at most len(DEMOS).
        train, val, test: Even numbers, 36 in all at most.

    Raises:
        ValueError: there are not so many sentences or demos.
    """
    sentences = [_example(*pair) for both in zip(HAPPY, SAD, strict=True) for pair in zip(both, MOODS, strict=True)]
    if train + val + test > len(sentences) or demos > len(DEMOS):
        raise ValueError(f"there are {len(sentences)} sentences and {len(DEMOS)} demos")
    program = Moods()
    program.tell.demos = [dspy.Example(sentence=sentence, mood=mood) for sentence, mood in DEMOS[:demos]]
    return Task(program, metric, *_cut(sentences, (train, val, test)))


def _example(sentence: str, mood: str) -> dspy.Example:
    return dspy.Example(sentence=sentence, mood=mood).with_inputs("sentence")


def _cut(sentences: Sequence[dspy.Example], sizes: Sequence[int]) -> list[list[dspy.Example]]:
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [list(sentences[start : start + size]) for start, size in zip(starts, sizes, strict=True)]


def hint(candidate: dict[str, str], reflective_dataset: Any, components_to_update: list[str]) -> dict[str, str]:
    """GEPA's ``ProposalFn`` without a language model: the first hint that the instruction lacks is put at its end."""
    return {name: _hinted(candidate[name]) for name in components_to_update}


def _hinted(text: str) -> str:
    return " ".join([text, *[line for line in HINTS if line not in text][:1]])
