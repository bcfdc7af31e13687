"""What events and reports hold of a search."""

from collections.abc import Mapping

from dspy_fst.fast.evolve import Search
from dspy_fst.run.phase_reports import CycleReport

OWN_FIELDS = ("reflections", "accepted")
"""Counts of a search that are fields of its report."""


def cycle_report(cycle: int, search: Search, recoveries: Mapping[str, int], seconds: float) -> CycleReport:
    """
    Args:
        recoveries: Failures of the engine that were survived, by kind.
        seconds: Wall time of its rollouts.
    """
    return CycleReport(
        cycle=cycle,
        scores=search.population.scores,
        population=tuple(member.digest for member in search.population.members),
        rollouts=search.rollouts,
        repeats=search.repeats,
        reflections=search.counts["reflections"],
        proposals_accepted=search.counts["accepted"],
        sampled_tokens=search.sampled_tokens,
        counts={**{name: count for name, count in search.counts.items() if name not in OWN_FIELDS}, **recoveries},
        seconds=seconds,
    )


def candidates_told(search: Search) -> list[dict[str, object]]:
    """Every candidate that was scored, with its mean over the anchors."""
    return [
        {"digest": candidate.digest, "texts": dict(candidate.texts), "score": sum(row) / len(row)}
        for candidate, row in zip(search.candidates, search.scores, strict=True)
    ]
