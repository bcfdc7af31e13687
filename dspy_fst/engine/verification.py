"""Verifies that the engine serves the weights that the trainer published, by its tensors and its log-probabilities.

The tensors are compared exactly, one by one. The tensors that the engine read from the folder must be those of the
trainer (by digest), and the tensors that its forward pass uses must be those that it read (`Scorer.held`).

The log-probabilities show faults that no tensor shows: another arithmetic or position scaling, or a kernel that reads
correct tensors wrongly. Sound engines differ there too, in bfloat16 by more than stale weights do, so log-probabilities
alone prove nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dspy_fst.engine.base import Checkpoint, Holding, Scorer
from dspy_fst.errors import DiskError, SyncError
from dspy_fst.types import WeightsVersion

MEAN_GAP_LIMITS = {"float32": 1e-3, "bfloat16": 0.15}
"""Limit of the mean absolute gap on natural text, in nats per token; sound engines stay below it (ours).

bfloat16: almost three times the largest mean of sound weights in `benchmarks/results/sync.json` (0.053, in process).
float32: ten times the largest gap at a single token in `benchmarks/results/architectures.json` (9.6e-5, Qwen3-Next).
The margin is for models, kernels and lengths that were not measured: a wider or deeper model has longer sums and rounds
more often. The limit detects an engine that computes something else. Wrong weights may differ by less, as the faults in
sync.json do in bfloat16; the comparison of tensors, which has no tolerance, detects them.
"""
SHOWN = 5
"""Number of tensors that an error names."""


@dataclass(frozen=True)
class Expected:
    """The published weights, and the trainer's log-probabilities under them."""

    checkpoint: Checkpoint
    texts: Sequence[Sequence[int]]
    """Token ids of natural text, e.g. prompts of the run with their replies."""
    scores: Sequence[Sequence[float]]
    """The trainer's log-probability of every token of ``texts`` but each first."""
    dtype: str
    """``"float32"`` or ``"bfloat16"``: the arithmetic of the trainer's body."""
    by_adapter: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    """``scores`` through each LoRA adapter, where there are several; ``scores`` are then the base's."""
    tolerance: float | None = None
    """Limit of the mean gap; None takes the `MEAN_GAP_LIMITS` of the lower of both precisions."""


@dataclass(frozen=True)
class Proof:
    """Result of a successful verification."""

    identical: bool
    """Whether every tensor was compared; False if the engine cannot compare, so that only log-probabilities were."""
    mean_gap: float
    """Mean absolute gap to the trainer's log-probabilities, in nats per token; the largest of the adapters'."""


def verify(engine: Scorer, expected: Expected) -> Proof:
    """Verify that the engine serves the published weights, by its tensors and its log-probabilities.

    Raises:
        SyncError: it serves others; the message names the tensors, or the gap.
        DiskError: the folder does not hold what the trainer wrote.
    """
    held = verify_tensors(engine, expected.checkpoint)
    return Proof(held is not None, verify_scores(engine, expected, held))


def verify_tensors(engine: Scorer, checkpoint: Checkpoint) -> Holding | None:
    """Compare the tensors that the engine computes with, if it can; returns what it holds, None where it cannot.

    Raises:
        SyncError, DiskError: see `verify_identity`.
    """
    held = engine.held(checkpoint)
    if held is not None:
        verify_identity(held, checkpoint)
    return held


def verify_scores(engine: Scorer, expected: Expected, held: Holding | None) -> float:
    """Compare the log-probabilities of both sides: through each LoRA adapter and through the base.

    Args:
        held: What the engine holds (see `verify_tensors`); its precision decides which limit counts.

    Returns:
        The largest mean gap, in nats per token.

    Raises:
        SyncError: see `verify_numbers`; the message names the adapter.
    """
    sides = {expected.dtype, held.dtype if held else expected.dtype}
    measured = MEAN_GAP_LIMITS["float32" if sides == {"float32"} else "bfloat16"]
    tolerance = measured if expected.tolerance is None else expected.tolerance
    version = expected.checkpoint.version
    sampled = engine.score(expected.texts)
    gaps = [verify_numbers(sampled, expected.scores, tolerance=tolerance, version=version)]
    for name, scores in expected.by_adapter.items():
        sampled = engine.score(expected.texts, adapter=name)
        gaps.append(verify_numbers(sampled, scores, tolerance=tolerance, version=f"{version}, LoRA adapter {name}"))
    return max(gaps)


def verify_identity(held: Holding, checkpoint: Checkpoint) -> None:
    """Refuse weights if any tensor differs from the published one.

    Raises:
        DiskError: the folder does not hold what was written, so loading it again would not help.
        SyncError: the engine uses other tensors than the folder's; the message names them, and how each differs.
    """
    written = _faults_of_writing(held, checkpoint)
    if written:
        raise DiskError(
            f"weights {checkpoint.version}: {checkpoint.path} does not hold what the trainer wrote: "
            f"{_listed(written)}. Look for a failing disk or another process that writes there; nothing was sampled "
            "from them"
        )
    if held.wrong:
        raise SyncError(
            f"weights {checkpoint.version}: the engine uses other weights than were published: {_listed(held.wrong)}. "
            "Nothing was sampled from them"
        )


def verify_numbers(
    sampled_by: Sequence[Sequence[float]],
    trained_by: Sequence[Sequence[float]],
    *,
    tolerance: float,
    version: WeightsVersion,
) -> float:
    """Compare the log-probabilities of both sides on the same natural texts, by their mean absolute gap.

    The mean is used because the log-probability of a single very unlikely token may be off by whole nats in bfloat16,
    even for sound weights.

    Args:
        sampled_by: The engine's log-probabilities, one sequence per text.
        trained_by: The trainer's.
        tolerance: Limit of the mean gap, in nats per token.
        version: Named in the error.

    Returns:
        The mean absolute gap, in nats per token.

    Raises:
        SyncError: it exceeds ``tolerance``, or is not a number.
    """
    gaps = [
        abs(a - b)
        for sampled, trained in zip(sampled_by, trained_by, strict=True)
        for a, b in zip(sampled, trained, strict=True)
    ]
    mean = float(np.mean(gaps)) if gaps else 0.0
    if not mean <= tolerance:  # written so that NaN counts as a gap
        raise SyncError(
            f"weights {version}: the engine's log-probabilities differ from the trainer's by {mean:.3g} nats a token "
            f"on average over {len(gaps)} tokens (at most {np.max(gaps):.3g}), more than {tolerance:g}. It computes "
            "something else from these weights; nothing was sampled from them"
        )
    return mean


def _faults_of_writing(held: Holding, checkpoint: Checkpoint) -> dict[str, str]:
    """Tensor -> how the one that the engine read differs from its writer's; parts without digests are left out."""
    adapters = {adapter.tensor(""): adapter.digests for adapter in checkpoint.adapters}
    wrote = {prefix + name: digest for prefix, digests in adapters.items() for name, digest in digests.items()}
    unrecorded = tuple(prefix for prefix, digests in adapters.items() if not digests)
    read = {name: digest for name, digest in held.digests.items() if not name.startswith(unrecorded)}
    if held.with_base and checkpoint.digests:
        wrote |= checkpoint.digests
    else:
        read = {name: digest for name, digest in read.items() if name.startswith(tuple(adapters))}
    faults = dict.fromkeys(wrote.keys() - read.keys(), "missing")
    faults |= dict.fromkeys(read.keys() - wrote.keys(), "nobody wrote it")
    return faults | {name: "its bytes differ" for name in wrote.keys() & read.keys() if wrote[name] != read[name]}


def _listed(faults: Mapping[str, str]) -> str:
    named = [f"{name} ({faults[name]})" for name in sorted(faults)]
    return ", ".join(named[:SHOWN]) + (f" and {len(named) - SHOWN} more" if len(named) > SHOWN else "")
