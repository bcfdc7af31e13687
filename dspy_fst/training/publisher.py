"""Handing the trainer's weights to the engine, and the proof that it serves them before anybody samples."""

from collections.abc import Callable, Iterable

from dspy_fst.engine.base import Checkpoint, Scorer
from dspy_fst.engine.verification import Expected, verify, verify_identity
from dspy_fst.policy_lm import EngineHandle, PolicyLM
from dspy_fst.run.directory import RunDirectory
from dspy_fst.slow.trainer import Trainer
from dspy_fst.training.natural_texts import NaturalTexts
from dspy_fst.types import Rollout, WeightsVersion, version_of

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

        def prove(engine: Scorer) -> None:
            if not verify(engine, expected).identical and not self._told_blind:
                self._told_blind = True
                self._tell(BLIND)

        self._load(checkpoint, prove)

    def serve_again(self, checkpoint: Checkpoint) -> None:
        """Serve weights of an earlier publish, which the trainer holds no more: their tensors alone are compared.

        Their numbers were compared when they were published.

        Raises:
            SyncError, EngineError: as `serve` has it.
        """

        def prove(engine: Scorer) -> None:
            if (held := engine.held(checkpoint)) is not None:
                verify_identity(held, checkpoint)

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
        self.moved_at = 0
        """Steps after which the weights moved last."""
        self.unsaved = True
        """Whether the trainer changed since the last committed state."""

    @property
    def moved_to(self) -> WeightsVersion:
        """The version of the weights as they are now."""
        return version_of(self.moved_at)

    def publish(self, step: int) -> None:
        """Hand the weights that the ``step``-th update moved last to the engine and prove that it serves them.

        Raises:
            SyncError, DiskError, EngineError: as `Publishing.serve` has it.
        """
        version = version_of(step)
        self.moved_at, self.unsaved = step, True
        with self._run.writing():
            checkpoint = self._trainer.publish(self._run.weights_path(version), version)
        self._serving.serve(checkpoint)

    def serve_again(self, version: WeightsVersion) -> None:
        """Serve kept weights of an earlier step."""
        self._serving.serve_again(Checkpoint(version, self._run.weights_path(version)))

    def see_texts(self, rollouts: Iterable[Rollout]) -> None:
        """Verify later publishes on these prompts and replies, unless some were seen before."""
        self._serving.texts.see(rollouts)

    def prune(self, best: Iterable[WeightsVersion]) -> None:
        """Remove weights that are neither the first, nor among the best, nor among the newest."""
        with self._run.writing():
            self._run.prune_weights(self._keep, set(best))


def recoveries(policy: PolicyLM) -> dict[str, int]:
    """Failures of the engine that were survived since this was last asked, by kind."""
    return {f"engine: {what}": count for what, count in policy.handle.engine.take_counts().items()}
