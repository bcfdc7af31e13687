"""What samples tokens: the one protocol that every engine meets, and the rule that its weights are verified."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from dspy.lm15 import Request, Response

from dspy_fst.errors import SyncError
from dspy_fst.types import WeightsVersion


@dataclass(frozen=True)
class Completion:
    """One reply with the exact tokens behind it."""

    response: Response
    """What DSPy's adapters read; carries no provider data."""
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    weights: WeightsVersion
    reasoning_tokens: int = 0
    """See `types.Call`."""


@dataclass(frozen=True)
class Checkpoint:
    """One immutable Hugging Face folder of policy weights (untied, with tokenizer) and its version."""

    version: WeightsVersion
    path: Path


class Scorer(Protocol):
    """Whatever scores token sequences under the weights that it serves."""

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of every token but the first of each sequence, at temperature 1."""
        ...


class Engine(Scorer, Protocol):
    """Samples replies from the newest weights it was given. Thread-safe; owns what it starts."""

    @property
    def weights(self) -> WeightsVersion | None:
        """The version now served; None before the first load."""
        ...

    def load(self, checkpoint: Checkpoint) -> None:
        """Serve these weights from now on; starts the engine when it is not running.

        No reply sampled after this returns comes from older weights.

        Raises:
            EngineError: it cannot start, or does not answer in time.
        """
        ...

    def complete(self, request: Request, seed: int) -> Completion:
        """Sample one reply. ``seed`` fixes the draw given the weights (up to batching on a server).

        Raises:
            EngineError: the engine is gone or did not answer in time.
            dspy.lm15.LM15Error: the request itself is refused (e.g. the prompt exceeds the context).
        """
        ...

    def expect(self, callers: int) -> None:
        """Tell how many rollouts are in flight, so that an engine which batches knows for whom to wait."""
        ...

    def on_recovery(self, tell: Callable[[str], None], verify: Callable[[Scorer], None] | None) -> None:
        """Have each recovery from a failure told as a sentence, and the recovered engine verified before it samples.

        ``verify`` belongs to the weights that are loaded next; None lets go of the last one, too.
        """
        ...

    def take_counts(self) -> Counter[str]:
        """Failures that were survived since the last call, by kind."""
        ...

    def close(self) -> None:
        """Release everything that was started. May be called twice."""
        ...


def verify_sync(
    sampled_by: Sequence[Sequence[float]],
    trained_by: Sequence[Sequence[float]],
    *,
    tolerance: float,
    version: WeightsVersion,
) -> float:
    """Compare the two sides' log-probabilities on the same probe sequences.

    Returns:
        The largest absolute gap, in nats.

    Raises:
        SyncError: a gap exceeds ``tolerance`` or is not a number; the message names the probes and gaps.
    """
    gaps = [
        [abs(a - b) for a, b in zip(sampled, trained, strict=True)]
        for sampled, trained in zip(sampled_by, trained_by, strict=True)
    ]
    # `not <=` and not `>`: a NaN must count as a gap.
    wrong = [i for i, probe in enumerate(gaps) if any(not gap <= tolerance for gap in probe)]
    if wrong:
        shown = ", ".join(f"probe {i}: {np.max(gaps[i]):.3g} over {len(gaps[i])} tokens" for i in wrong)
        raise SyncError(
            f"weights {version}: the engine's log-probabilities differ from the trainer's by more than "
            f"{tolerance:g} nats on {len(wrong)} of {len(gaps)} probe sequences ({shown}). The engine serves "
            "stale or altered weights; nothing was sampled from them."
        )
    return max((gap for probe in gaps for gap in probe), default=0.0)
