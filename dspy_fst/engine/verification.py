"""Proof that the engine serves the weights that the trainer published: the tensors themselves, then numbers.

Identity comes first, tensor by tensor and exact: what the trainer held is what the engine read from the folder (by
digest), and what the engine read is what its forward pass uses (`Scorer.held`). Numbers come second. They show what no
tensor does: another arithmetic, position scaling, kernels that read right tensors wrongly. Even sound engines differ
there, in bfloat16 more than stale weights do, so numbers alone prove nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dspy_fst.engine.base import Checkpoint, Holding, Scorer
from dspy_fst.errors import DiskError, SyncError
from dspy_fst.types import WeightsVersion

MEAN_GAP_LIMITS = {"float32": 1e-3, "bfloat16": 0.15}
"""Mean absolute gap in nats a token on natural text that sound engines stay below (ours).

bfloat16: almost three times the largest mean of sound weights in `benchmarks/results/sync.json` (0.053, in process).
float32: ten times the largest gap at any one token in `benchmarks/results/architectures.json` (9.6e-5, Qwen3-Next). The
margin is for models, kernels and lengths that were not measured: the sums of a wider or deeper model round more often.
Such a limit finds an engine that computes something else. Weights that differ by less, as every fault in sync.json may
in bfloat16, are found by the comparison of tensors, which has no limit.
"""
SHOWN = 5
"""Tensors that an error names."""


@dataclass(frozen=True)
class Expected:
    """What the trainer says of the weights that were published."""

    checkpoint: Checkpoint
    texts: Sequence[Sequence[int]]
    """Token ids of natural text, e.g. prompts of the run with their replies."""
    scores: Sequence[Sequence[float]]
    """The trainer's log-probability of every token of ``texts`` but each first."""
    dtype: str
    """``"float32"`` or ``"bfloat16"``: the arithmetic of the trainer's body."""
    tolerance: float | None = None
    """Limit of the mean gap; None is the measured one of the lower precision of both sides."""


@dataclass(frozen=True)
class Proof:
    """What was found of weights that may be sampled from."""

    identical: bool
    """Whether every tensor was compared; False where the engine cannot tell and only numbers were."""
    mean_gap: float
    """Mean absolute gap to the trainer's log-probabilities, nats a token."""


def verify(engine: Scorer, expected: Expected) -> Proof:
    """Prove that the engine serves the published weights.

    Raises:
        SyncError: it does not; the message names the tensors, or the gap.
        DiskError: the folder does not hold what the trainer wrote.
    """
    held = engine.held(expected.checkpoint)
    if held is not None:
        verify_identity(held, expected.checkpoint)
    sides = {expected.dtype, held.dtype if held else expected.dtype}
    measured = MEAN_GAP_LIMITS["float32" if sides == {"float32"} else "bfloat16"]
    tolerance = measured if expected.tolerance is None else expected.tolerance
    sampled = engine.score(expected.texts)
    gap = verify_numbers(sampled, expected.scores, tolerance=tolerance, version=expected.checkpoint.version)
    return Proof(held is not None, gap)


def verify_identity(held: Holding, checkpoint: Checkpoint) -> None:
    """Refuse weights of which a tensor is not the one that was published.

    Raises:
        DiskError: the folder is not what was written, which no other load would mend.
        SyncError: the engine uses something else than the folder; it names the tensors, and how each differs.
    """
    written = _faults_of_writing(held.digests, checkpoint.digests) if checkpoint.digests else {}
    if written:
        raise DiskError(
            f"weights {checkpoint.version}: {checkpoint.path} does not hold what the trainer wrote: {_shown(written)}. "
            "Look for a failing disk or another process that writes there; nothing was sampled from them"
        )
    if held.wrong:
        raise SyncError(
            f"weights {checkpoint.version}: the engine uses other weights than were published: {_shown(held.wrong)}. "
            "Nothing was sampled from them"
        )


def verify_numbers(
    sampled_by: Sequence[Sequence[float]],
    trained_by: Sequence[Sequence[float]],
    *,
    tolerance: float,
    version: WeightsVersion,
) -> float:
    """Compare both sides' log-probabilities on the same natural texts by their mean absolute gap.

    A mean, because one token that hardly ever comes there may be off by whole nats in bfloat16, on sound weights.

    Returns:
        The mean absolute gap, in nats a token.

    Raises:
        SyncError: it exceeds ``tolerance``, or is not a number.
    """
    gaps = [
        abs(a - b)
        for sampled, trained in zip(sampled_by, trained_by, strict=True)
        for a, b in zip(sampled, trained, strict=True)
    ]
    mean = float(np.mean(gaps)) if gaps else 0.0
    if not mean <= tolerance:  # and not `>`: a NaN must count as a gap
        raise SyncError(
            f"weights {version}: the engine's log-probabilities differ from the trainer's by {mean:.3g} nats a token "
            f"on average over {len(gaps)} tokens (at most {np.max(gaps):.3g}), more than {tolerance:g}. It computes "
            "something else from these weights; nothing was sampled from them"
        )
    return mean


def _faults_of_writing(read: Mapping[str, str], wrote: Mapping[str, str]) -> dict[str, str]:
    faults = dict.fromkeys(wrote.keys() - read.keys(), "missing")
    faults |= dict.fromkeys(read.keys() - wrote.keys(), "nobody wrote it")
    return faults | {name: "its bytes differ" for name in wrote.keys() & read.keys() if wrote[name] != read[name]}


def _shown(faults: Mapping[str, str]) -> str:
    named = [f"{name} ({faults[name]})" for name in sorted(faults)]
    return ", ".join(named[:SHOWN]) + (f" and {len(named) - SHOWN} more" if len(named) > SHOWN else "")
