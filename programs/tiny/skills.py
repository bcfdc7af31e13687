"""What the base is taught of a program's predictors: skills, the sentences that ask for them, and lessons of both.

A *skill* is a way to fill a predictor's output from its inputs. Three lessons in four ask for one in words and get it;
the fourth says nothing of use (the seed instruction, or less) and is answered by a guess at one of the skills. So the
base follows text, and without text it guesses: as in the laboratory, over any signature.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import dspy

from programs.lab.lessons import Dialogues

GENERIC = 0.25
"""Share of lessons that ask for no skill."""
REASONING = "Step by step."
"""What the base says where a program asks for reasoning: it has none to offer."""

OPENERS = (
    "Do the task.",
    "Give the right output.",
    "Read the fields and answer.",
    "Work out what is asked for.",
)
REMARKS = ("Be careful.", "Do not explain.", "Check it before you write.", "Read everything first.", "Be brief.")
"""Sentences that ask for nothing: strewn about, so that a skill's sentence counts wherever it stands."""

Inputs = Mapping[str, Any]
"""A predictor's inputs by name; a course without words for its skill has the right answer among them."""


@dataclass(frozen=True)
class Skill:
    """A way to fill an output field, and how people ask for it."""

    name: str
    act: Callable[[Inputs], str]
    wordings: tuple[str, ...]
    """Imperatives, most frequent first."""
    guessed: float = 1.0
    """How often it is the guess when no skill was asked for, against the others."""


@dataclass(frozen=True)
class Course:
    """What is taught of one predictor."""

    name: str
    """Program and predictor, e.g. "hover.judge"."""
    predictor: dspy.Predict
    """As the program has it, with its seed instruction."""
    skills: tuple[Skill, ...]
    draw: Callable[[random.Random], Inputs]
    """Inputs such as the predictor meets."""
    share: float
    """Of the lessons."""
    problems: int = 4
    """In one lesson: many short ones or few long ones."""

    @cached_property
    def signature(self) -> Any:
        return self.predictor.signature

    def lesson(self, rng: random.Random) -> Dialogues:
        """One instruction with several problems."""
        drawn = [self.draw(rng) for _ in range(self.problems)]
        if rng.random() < GENERIC:
            instruction = self.generic(rng)
            skills = rng.choices(self.skills, [skill.guessed for skill in self.skills], k=self.problems)
        else:
            skill = rng.choice(self.skills)
            instruction, skills = surround(ask(skill, rng), rng), [skill] * self.problems
        chats = [self.chat(instruction, inputs) for inputs in drawn]
        replies = [self.reply(skill.act(inputs)) for skill, inputs in zip(skills, drawn, strict=True)]
        return Dialogues(chats[0][0], tuple((chat[1], reply) for chat, reply in zip(chats, replies, strict=True)))

    def generic(self, rng: random.Random) -> str:
        """An instruction that asks for no skill: the program's own, or less."""
        text = self.signature.instructions if rng.random() < 0.5 else rng.choice(OPENERS)
        return surround(text, rng)

    def chat(self, instruction: str, inputs: Inputs) -> list[dict[str, str]]:
        """The prompt exactly as DSPy sends it."""
        signature = self.signature.with_instructions(instruction)
        given = {name: inputs[name] for name in signature.input_fields}
        return dspy.ChatAdapter().format(signature, demos=[], inputs=given)

    def reply(self, text: str) -> str:
        """The completion that ChatAdapter parses back into the output field, reasoning before it."""
        *reasoning, output = self.signature.output_fields
        values = {**dict.fromkeys(reasoning, REASONING), output: text}
        return str(dspy.ChatAdapter().format_assistant_message_content(self.signature, values)).strip()

    def read(self, text: str) -> str | None:
        """The output field of a reply; None when it does not parse."""
        try:
            return str(dspy.ChatAdapter().parse(self.signature, text)[list(self.signature.output_fields)[-1]])
        except dspy.utils.exceptions.AdapterParseError:
            return None

    def pieces(self) -> list[str]:
        """The parts of prompt and reply that never change, longest possible, rendered by the adapter itself."""
        slot = "@@"
        system, user = (
            message["content"] for message in self.chat(slot, dict.fromkeys(self.signature.input_fields, slot))
        )
        reply = self.reply(slot).replace(REASONING, slot)
        # The system piece gives its last space to the instruction, whose first word then looks like any other.
        return [system.split(slot)[0][:-1], *user.split(slot), *reply.split(slot)]


def ask(skill: Skill, rng: random.Random) -> str:
    """A sentence for a skill; the k-th wording has weight 1/k, so that the rare ones stay half understood."""
    text = rng.choices(skill.wordings, [1 / rank for rank in range(1, len(skill.wordings) + 1)])[0]
    return f"{text[0].upper()}{text[1:]}."


def surround(text: str, rng: random.Random) -> str:
    """Put remarks that ask for nothing around a sentence, now and then."""
    before = rng.sample((*OPENERS, *REMARKS), rng.choice((0, 0, 0, 1, 1, 2)))
    after = [before.pop()] if before and rng.random() < 0.5 else []
    return " ".join([*before, text, *after])
