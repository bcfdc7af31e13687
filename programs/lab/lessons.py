"""The pretraining data: instructions in many wordings, and what the teacher answers to them.

Three lessons in four state a rule and get the right answer. The fourth has a generic instruction and gets a hedge:
a guess at one of a few rules, drawn anew for every problem. So the base follows text, and without text it guesses.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from programs.lab.operations import BY_NAME, OPENERS, REMARKS, Chain, apply, chains, say
from programs.lab.world import draw_digits

GENERIC = 0.25
"""Share of lessons without a rule."""
COMPOSED = 0.4
"""Share of two-operation rules among the lessons that state one."""

EMPHASIS = {"reverse": 4, "drop_last": 2, "drop_first": 2}
"""How often an operation is drawn, others 1: reversing takes a small model longest to learn."""

HELD_OUT = (("ends", "decrement"), ("decrement", "ends"))
"""What no lesson states, in any wording: the harder world's composition. The main world's is stated now and then."""

HEDGE: dict[Chain, float] = {
    ("copy",): 0.21,
    ("ascending",): 0.15,
    ("reverse",): 0.08,
    ("drop_last",): 0.1,
    ("increment",): 0.1,
    ("rotate_left",): 0.1,
    ("swap_ends",): 0.08,
    ("ends",): 0.1,
    ("reverse", "drop_last"): 0.08,
}
"""What a generic instruction is answered with. The composition of the main world is a rare guess, so that training
without text has something to start from; that of the harder world is none."""


@dataclass(frozen=True)
class Lesson:
    """One instruction with several problems."""

    instruction: str
    problems: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Dialogues:
    """A lesson as it is sent: one system message with several exchanges, none of which sees another."""

    system: dict[str, str]
    exchanges: tuple[tuple[dict[str, str], str], ...]
    """(user message, reply)."""


SINGLES = [chain for chain in chains() if len(chain) == 1]
COMPOSITIONS = [chain for chain in chains() if len(chain) == 2 and chain not in HELD_OUT]


def _draw_chain(rng: random.Random) -> Chain:
    among = COMPOSITIONS if rng.random() < COMPOSED else SINGLES
    return rng.choices(among, [prod(EMPHASIS.get(name, 1) for name in chain) for chain in among])[0]


def _wording(name: str, rng: random.Random) -> str:
    """A wording, the k-th with weight 1/k: the rare ones stay half understood, so that wording matters."""
    wordings = BY_NAME[name].wordings
    return rng.choices(wordings, [1 / rank for rank in range(1, len(wordings) + 1)])[0]


def _surround(rule_text: str, rng: random.Random) -> str:
    """Put an opener before and remarks around the sentence that matters, now and then on lines of their own."""
    before = [rng.choice(OPENERS)] if rng.random() < 0.4 else []
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        before.append(rng.choice(REMARKS))
    after = [before.pop()] if before and rng.random() < 0.5 else []
    return rng.choice((" ", " ", "\n")).join([*before, rule_text, *after])


def draw_lesson(rng: random.Random, problems: int) -> Lesson:
    """Draw one lesson of the mixture."""
    lists = tuple(draw_digits(rng) for _ in range(problems))
    if rng.random() < GENERIC:
        remarks = rng.sample(REMARKS, rng.choice((0, 0, 1)))
        instruction = " ".join([OPENERS[0] if rng.random() < 0.3 else rng.choice(OPENERS), *remarks])
        rules = rng.choices(list(HEDGE), list(HEDGE.values()), k=problems)
    else:
        chain = _draw_chain(rng)
        instruction = _surround(say(tuple(_wording(name, rng) for name in chain), rng), rng)
        rules = [chain] * problems
    answers = tuple(
        " ".join(map(str, apply(rule, [int(digit) for digit in numbers.split()])))
        for rule, numbers in zip(rules, lists, strict=True)
    )
    return Lesson(instruction, lists, answers)


def tokenizer_texts(count: int = 4000) -> Iterator[str]:
    """Text to train the tokenizer on: instructions of the lessons with their lists, and every wording there is."""
    rng = random.Random("tokenizer")
    for _ in range(count):
        lesson = draw_lesson(rng, 2)
        # The leading space is how an instruction's first word looks after the adapter's fixed piece.
        yield from (f" {lesson.instruction}", *lesson.problems)
    for operation in BY_NAME.values():
        yield from [f" {text}." for text in (*operation.wordings, operation.unheard)] * 20
