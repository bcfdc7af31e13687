"""Recorded calls as the trainer reads them: sequences to score, and log-probabilities that must be whole."""

import math
from collections.abc import Sequence

from dspy_fst.errors import NotFiniteError, TrainingError
from dspy_fst.slow.batching import Scored
from dspy_fst.types import Call, Row


def completions(calls: Sequence[Call] | Sequence[Row]) -> list[Scored]:
    """Each call's prompt and completion, of which the completion is scored at the call's temperature."""
    return [Scored((*call.prompt_ids, *call.completion_ids), len(call.prompt_ids), call.temperature) for call in calls]


def check_recorded(rows: Sequence[Row]) -> None:
    """
    Raises:
        TrainingError: a row lacks log-probabilities of its tokens.
        NotFiniteError: one of them is not finite.
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
