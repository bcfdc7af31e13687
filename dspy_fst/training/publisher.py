"""Handing the trainer's weights to the engine, and the proof that it serves them before anybody samples."""

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING
from weakref import WeakSet

import dspy

from dspy_fst.engine.base import Checkpoint, CountingEngine, Holding, PromptTokens, Scorer
from dspy_fst.engine.verification import Expected, verify_scores, verify_tensors
from dspy_fst.errors import SyncError
from dspy_fst.policy_lm import EngineHandle, PolicyLM
from dspy_fst.rollout.rendering import render, renderer_of
from dspy_fst.rollout.rollouter import Rollouter
from dspy_fst.run.directory import RunDirectory
from dspy_fst.run.phase_reports import StepReport
from dspy_fst.run.state import Documents, StateFields, start_version
from dspy_fst.run.validated import Validated, best_validated
from dspy_fst.slow.trainer import Trainer
from dspy_fst.types import WARM_START, Rollout, WeightsVersion, version_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ---- the texts on which log-probabilities are compared -------------------------------------------


TEXTS, TEXT_TOKENS = 8, 128
"""How many texts are scored, and their longest: a mean over some hundred tokens, and one batch on any engine (ours)."""
SHORT_TOKENS, FULL_EVERY = 16, 64
"""Length of the one short text between two publishes that score all texts, and from how many publishes one does (ours).

Through a LoRA adapter all texts take vLLM on a CPU twenty times as long as the rest of a publish
(`benchmarks/results/lora_publish.json`).
"""
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

    def __init__(
        self,
        program: dspy.Module,
        trained: Iterable[str],
        examples: Sequence[dspy.Example],
        tokenizer: "PreTrainedTokenizerBase",
    ):
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

    def short(self, publish: int) -> list[list[int]]:
        """The beginning of one of the texts; each publish takes the next one."""
        ids = self.ids()
        return [text[:SHORT_TOKENS] for text in ids[publish % len(ids) :][:1]]

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


# ---- publishing ----------------------------------------------------------------------------------


BLIND = (
    "the server at attach_url runs without dspy_fst's worker extension, so its weights are compared by their "
    "log-probabilities only, which stale weights may pass; launch it with dspy_fst/engine/vllm/served on its "
    "PYTHONPATH and --worker-extension-cls dspy_fst_weight_check.WeightCheck"
)


class Publishing:
    """Has an engine serve a trainer's weights, verified at each load and after each recovery of the engine.

    All tensors are compared each time. Log-probabilities are compared on all texts the first time that a server is
    published to, every `FULL_EVERY` publishes, and where tensors cannot be compared; else on one short text through
    each LoRA adapter, and on all texts if that one exceeds the limit. A recovery compares the texts of its publish,
    because the trainer may have moved on; the next publish then takes all, as the server is another one.

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
        self._publishes = 0
        self._proved: WeakSet[Scorer] = WeakSet()
        """Servers, or the engine itself, that scored all texts as the trainer does."""
        self._scoring = threading.Lock()
        """Held while scores are compared: the trainer scores for one server at a time, and for the others not again."""

    def serve(self, checkpoint: Checkpoint) -> None:
        """Serve these weights, which are the trainer's of now.

        Raises:
            SyncError: the engine uses other weights, or computes something else from them.
            DiskError: the folder does not hold what the trainer wrote.
            EngineError: the engine does not load them.
        """
        publish, self._publishes = self._publishes, self._publishes + 1
        passed: Expected | None = None
        published = False

        @cache
        def expected(*, full: bool) -> Expected:
            return self._expected(checkpoint, self.texts.ids() if full else self.texts.short(publish))

        def prove(engine: Scorer) -> None:
            held = verify_tensors(engine, checkpoint)  # servers side by side: each reads the whole folder
            with self._scoring:
                prove_scores(engine, held)

        def prove_scores(engine: Scorer, held: Holding | None) -> None:
            nonlocal passed
            if held is None:
                self._tell_blind()
            if published and passed is not None:
                verify_scores(engine, passed, held)
                return
            if held is not None and engine in self._proved and publish % FULL_EVERY:
                with suppress(SyncError):  # in bfloat16 a few tokens may exceed the limit by chance; all texts decide
                    verify_scores(engine, expected(full=False), held)
                    passed = expected(full=False)
                    return
            verify_scores(engine, expected(full=True), held)
            self._proved.add(engine)
            passed = expected(full=True)

        self._load(checkpoint, prove)
        published = True

    def _expected(self, checkpoint: Checkpoint, ids: list[list[int]]) -> Expected:
        """What the trainer makes of these texts, through each adapter and through the base."""
        names = [adapter.name for adapter in checkpoint.adapters] if len(checkpoint.adapters) > 1 else []
        return Expected(
            checkpoint,
            ids,
            self._trainer.score(ids),
            self._trainer.dtype,
            by_adapter={name: self._trainer.score(ids, adapter=name) for name in names},
            tolerance=self._tolerance,
        )

    def _tell_blind(self) -> None:
        if not self._told_blind:
            self._told_blind = True
            self._tell(BLIND)

    def serve_again(self, checkpoint: Checkpoint) -> None:
        """Serve weights of an earlier publish, which the trainer holds no more: their tensors alone are compared.

        Their numbers were compared when they were published.

        Raises:
            SyncError, EngineError: as `serve` has it.
        """

        def prove(engine: Scorer) -> None:
            verify_tensors(engine, checkpoint)

        self._load(checkpoint, prove)

    def _load(self, checkpoint: Checkpoint, prove: Callable[[Scorer], None]) -> None:
        """Load the weights; ``prove`` raises where the engine serves others, now and after each recovery."""
        proved = False

        def proof(engine: Scorer) -> None:
            nonlocal proved
            prove(engine)
            proved = True

        engine = self._handle.engine
        engine.on_recovery(self._tell, proof)
        engine.load(checkpoint)
        if not proved:  # an engine of somebody's own, whose load does not ask for the proof
            proof(engine)
        self._handle.checkpoint = checkpoint


class Publisher:
    """A run's published weights: written to disk, proved on the engine, pruned.

    Args:
        run: Where the weights are kept.
        trainer: Whose weights they are.
        serving: Has the engine serve them.
        keep: Newest versions that stay, beside the first and the best.
    """

    def __init__(self, run: RunDirectory, trainer: Trainer, serving: Publishing, keep: int):
        self._run, self._trainer, self._serving, self._keep = run, trainer, serving, keep
        self._start = start_version(run.state)
        self.moved_at = 0
        """Steps after which the weights moved last."""
        self.unsaved = True
        """Whether the trainer changed since the last committed state."""
        self.written = threading.Event()
        """Set when the newest state is written; the weights must not change before."""
        self.written.set()

    @property
    def moved_to(self) -> WeightsVersion:
        """The version of the weights as they are now."""
        return version_of(self.moved_at) if self.moved_at else self._start

    def warm_started(self) -> None:
        """The trainer holds the weights of the warm start now, and so will the next state."""
        self._start, self.unsaved = WARM_START, True

    @property
    def facts(self) -> StateFields:
        """What a state says of the weights."""
        warm: StateFields = {"warm_start": True} if self._start == WARM_START else {}
        return {"moved_at": self.moved_at, **warm}

    def publish(self, step: int, sampled: Iterable[Rollout] = ()) -> None:
        """Hand the weights that the ``step``-th update moved last to the engine and prove that it serves them.

        Args:
            step: Updates so far.
            sampled: Rollouts of the step; the first that are ever given are the texts of the proof.

        Raises:
            SyncError, DiskError, EngineError: as `Publishing.serve` has it.
        """
        self.see_texts(sampled)
        self.moved_at, self.unsaved = step, True
        version = self.moved_to
        path = self._run.weights_path(version)
        if version == WARM_START:  # lies there: the trainer's reference is read from it
            self._serving.serve(Checkpoint.at(version, path))
            return
        with self._run.writing():
            checkpoint = self._trainer.publish(path, version)
        self._serving.serve(checkpoint)

    def commit(self, documents: Documents | None, *, wait: bool, **place: object) -> None:
        """Commit a state with the trainer's weights, documents and place in the run; see `RunDirectory.commit`."""
        save_trainer = self._trainer.state_writer() if self.unsaved else None
        self.written = self._run.commit(save_trainer, documents, wait=wait, **self.facts, **place)
        self.unsaved = False

    def serve_again(self, version: WeightsVersion) -> None:
        """Serve kept weights of an earlier step."""
        self._serving.serve_again(Checkpoint.at(version, self._run.weights_path(version)))

    def see_texts(self, rollouts: Iterable[Rollout]) -> None:
        """Verify later publishes on these prompts and replies, unless some were seen before."""
        self._serving.texts.see(rollouts)

    def prune(self, steps: Sequence[StepReport], validated: Sequence[Validated]) -> None:
        """Remove weights that are neither the first, nor among the best, nor among the newest."""
        committed = self._run.state.get("step", 0)
        best = best_versions(steps, committed) | best_validated(validated, committed)
        with self._run.writing():
            self._run.prune_weights(self._keep, best)


def recoveries(policy: PolicyLM, rollouter: Rollouter) -> dict[str, int]:
    """Failures of the engine, and of a cluster, that were survived since this was last asked, by kind."""
    parts = {"engine": policy.handle.engine.take_counts(), "rollouts": rollouter.take_counts()}
    return {f"{part}: {what}": count for part, counts in parts.items() for what, count in counts.items()}


def counted_prompts(policy: PolicyLM) -> Callable[[], PromptTokens | None]:
    """A function that returns the prompts sampled for from now on; None where the engine does not count them."""
    engine = policy.handle.engine
    return engine.count_prompts() if isinstance(engine, CountingEngine) else lambda: None


def best_versions(reports: Sequence[StepReport], committed: int) -> set[WeightsVersion]:
    """The weights that sampled the step with the highest mean reward: of all steps, and of the committed ones.

    A killed run goes on from its committed steps, so their best weights must be kept as well.

    Args:
        committed: Number of steps that the newest saved state holds.
    """
    versions = set()
    for candidates in (reports, [report for report in reports if report.step < committed]):
        measured = [report for report in candidates if report.reward is not None]
        if measured:
            versions.add(max(measured, key=lambda report: report.reward or 0.0).sampled_by)
    return versions
