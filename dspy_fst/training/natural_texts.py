"""The texts on which the engine's and the trainer's log-probabilities are compared after a publish."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import dspy

from dspy_fst.rollout.rendering import render, renderer_of
from dspy_fst.types import Rollout

TEXTS, TEXT_TOKENS = 8, 128
"""How many texts are scored, and their longest: a mean over some hundred tokens, and one batch on any engine (ours)."""
LAST_RESORT = (
    "The ferry leaves the northern harbour at a quarter past seven and reaches the island about an hour later. Tickets "
    "can be bought on board, but in summer it is wise to reserve a place for a car some days before.",
    "A triangle with sides of 3, 4 and 5 has a right angle between the two shorter sides, because 9 plus 16 is 25. Its "
    "area is half the product of these two sides, which is 6.",
    "Question: Which of the two rivers is longer, and by how much? Answer: The first one; it is 212 kilometres longer.",
)
"""Scored where the program's own prompts cannot be rendered yet."""


class NaturalTexts:
    """What both sides score after a publish: prompts of the run with their replies, as soon as there are any.

    Args:
        program: The copy that is trained.
        trained: Its predictors whose calls the weights learn from.
        examples: The first of the trainset; their prompts stand in until a rollout was played.
        tokenizer: The trainer's.
    """

    def __init__(self, program: dspy.Module, trained: Iterable[str], examples: Sequence[dspy.Example], tokenizer: Any):
        self._program, self._trained, self._tokenizer = program, frozenset(trained), tokenizer
        self._examples = examples
        self._recorded: list[list[int]] = []

    def see(self, rollouts: Iterable[Rollout]) -> None:
        """Keep the first calls that are played, so that every later publish is measured on the same texts."""
        for rollout in rollouts:
            for call in rollout.calls:
                if len(self._recorded) == TEXTS:
                    return
                self._recorded.append([*call.prompt_ids, *call.completion_ids][:TEXT_TOKENS])

    def ids(self) -> list[list[int]]:
        """The texts' token ids, each at least two long."""
        texts = self._recorded or list(islice(self._first_prompts(), TEXTS))
        texts = texts or [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in LAST_RESORT]
        return [text[:TEXT_TOKENS] for text in texts if len(text) > 1]

    def _first_prompts(self) -> Iterable[list[int]]:
        predictors = [p for name, p in self._program.named_predictors() if name in self._trained]
        renderer = renderer_of(self._tokenizer)
        for example in self._examples[:TEXTS]:
            inputs = example.inputs().toDict()
            for predictor in predictors:
                signature = predictor.signature
                if signature.input_fields.keys() <= inputs.keys():
                    asked = {name: inputs[name] for name in signature.input_fields}
                    if ids := render(predictor, signature.instructions, asked, renderer):
                        yield list(ids)
