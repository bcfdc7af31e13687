"""Recorded calls as the trainer reads them: sequences to score, and complete, finite log-probabilities."""

import math
from collections.abc import Sequence

from dspy_fst.errors import NotFiniteError, TrainingError
from dspy_fst.slow.batching import Scored
from dspy_fst.types import Call, Row


def completions(calls: Sequence[Call] | Sequence[Row]) -> list[Scored]:
    """Each call as a sequence whose completion is scored at the call's temperature."""
    return [Scored((*call.prompt_ids, *call.completion_ids), len(call.prompt_ids), call.temperature) for call in calls]


def check_recorded(rows: Sequence[Row]) -> None:
    """Check that every row has one finite log-probability per completion token.

    Raises:
        TrainingError: a row has more or fewer log-probabilities than tokens.
        NotFiniteError: a log-probability is not finite.
    """
    for index, row in enumerate(rows):
        who = f"call {index} ({row.predictor or 'unnamed'})"
        if len(row.logprobs) != len(row.completion_ids):
            raise TrainingError(
                f"{who} has {len(row.logprobs)} log-probabilities for its {len(row.completion_ids)} tokens; the engine "
                "must record the ones it sampled with"
            )
        if not all(map(math.isfinite, row.logprobs)):
            raise NotFiniteError(f"{who} was recorded with a log-probability that is not finite")
