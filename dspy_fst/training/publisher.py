"""Handing the trainer's weights to the engine, and the proof that it serves them before anybody samples."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import dspy

from dspy_fst.engine.base import Checkpoint, Scorer
from dspy_fst.engine.sync import Expected, verify, verify_identity
from dspy_fst.policy_lm import EngineHandle, PolicyLM
from dspy_fst.rollout.rendering import render, renderer_of
from dspy_fst.slow.trainer import Trainer
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


BLIND = (
    "the server at attach_url runs without dspy_fst's worker extension, so its weights are compared by their "
    "log-probabilities only, which stale weights may pass; launch it with dspy_fst/engine/vllm/served on its "
    "PYTHONPATH and --worker-extension-cls dspy_fst_weight_check.WeightCheck"
)


class Publishing:
    """Has an engine serve a trainer's weights, verified at each load and after each recovery of the engine.

    Args:
        handle: The engine's.
        trainer: Whose weights are published; scores the texts on its side.
        texts: Natural text for the comparison of numbers.
        tolerance: Limit of the mean gap in nats; None is the measured one.
        tell: Called with a sentence for each recovery, and once when the engine cannot compare its tensors.
    """

    def __init__(
        self,
        handle: EngineHandle,
        trainer: Trainer,
        texts: NaturalTexts,
        *,
        tolerance: float | None,
        tell: Callable[[str], None],
    ):
        self._handle, self._trainer, self.texts = handle, trainer, texts
        self._tolerance, self._tell, self._told_blind = tolerance, tell, False

    def serve(self, checkpoint: Checkpoint) -> None:
        """Serve these weights, which are the trainer's of now.

        Raises:
            SyncError: the engine uses other weights, or computes something else from them.
            DiskError: the folder does not hold what the trainer wrote.
            EngineError: the engine does not load them.
        """
        ids = self.texts.ids()
        expected = Expected(checkpoint, ids, self._trainer.score(ids), self._trainer.dtype, self._tolerance)

        proved = False

        def prove(engine: Scorer) -> None:
            nonlocal proved
            proof = verify(engine, expected)
            proved = True
            if not proof.identical and not self._told_blind:
                self._told_blind = True
                self._tell(BLIND)

        engine = self._handle.engine
        engine.on_recovery(self._tell, prove)
        engine.load(checkpoint)
        if not proved:  # an engine of somebody's own, whose load does not ask for the proof
            prove(engine)
        self._handle.checkpoint = checkpoint

    def serve_again(self, checkpoint: Checkpoint) -> None:
        """Serve weights of an earlier publish, which the trainer holds no more: their tensors alone are compared.

        Their numbers were compared when they were published.

        Raises:
            SyncError, EngineError: as `serve` has it.
        """

        proved = False

        def prove(engine: Scorer) -> None:
            nonlocal proved
            if (held := engine.held(checkpoint)) is not None:
                verify_identity(held, checkpoint)
            proved = True

        engine = self._handle.engine
        engine.on_recovery(self._tell, prove)
        engine.load(checkpoint)
        if not proved:
            prove(engine)
        self._handle.checkpoint = checkpoint


def recoveries(policy: PolicyLM) -> dict[str, int]:
    """Failures of the engine that were survived since this was last asked, by kind."""
    return {f"engine: {what}": count for what, count in policy.handle.engine.take_counts().items()}
