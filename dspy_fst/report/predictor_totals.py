"""What each predictor of a program did in a run, and what changes of its text brought. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dspy_fst.report.lineage import Node
from dspy_fst.run.phase_reports import StepReport
from dspy_fst.types import PredictorReport


@dataclass(frozen=True)
class PredictorTotals:
    """What one predictor did in all updates of a run, and what changes of its text brought.

    The figures of the updates are None when no update reports the predictor.
    """

    predictor: str
    calls: int | None
    tokens: int | None
    """Tokens sampled in its calls."""
    truncated: int | None
    """Calls that were cut off."""
    unparsed: int | None
    """Rollouts that ended in a reply of this predictor that does not parse."""
    rows: int | None
    """Calls that were trained on."""
    positive_rows: int | None
    """Of the rows, those with an advantage above 0."""
    flat_groups: int | None
    """Groups in which every call of this predictor has advantage 0."""
    advantage: float | None
    """Mean over its rows."""
    scores: tuple[float, ...]
    """The predictor's mean score in each update in which the metric gave it one."""
    changed: int
    """Candidates whose text for this predictor differs from their parent's."""
    changed_alone: int
    """Of these candidates, those whose other texts are their parent's."""
    gain: float | None
    """Mean over the candidates of ``changed_alone``: anchor score minus the parent's, under the same weights."""


SUMMED = ("calls", "tokens", "truncated", "unparsed", "rows", "positive_rows", "flat_groups")


def predictor_totals(steps: Sequence[StepReport], nodes: Mapping[str, Node]) -> tuple[PredictorTotals, ...]:
    """Every predictor that was called or has a text, in the order of the program's texts.

    Args:
        nodes: Digest -> candidate.
    """
    named = [name for node in nodes.values() for name in node.texts]
    called = [name for step in steps for name in step.predictors]
    changes = [(node, _changed(node, nodes)) for node in nodes.values()]
    return tuple(
        _totals(
            name,
            [step.predictors[name] for step in steps if name in step.predictors],
            changes=[changed for _, changed in changes if name in changed],
            gains=[_gain(node, nodes) for node, changed in changes if changed == [name]],
        )
        for name in dict.fromkeys(named + called)
    )


def _totals(
    name: str, reports: Sequence[PredictorReport], changes: Sequence[list[str]], gains: Sequence[float | None]
) -> PredictorTotals:
    rows = sum(report.rows or 0 for report in reports)
    measured = [gain for gain in gains if gain is not None]
    sums = {field: sum(getattr(r, field) or 0 for r in reports) if reports else None for field in SUMMED}
    return PredictorTotals(
        predictor=name,
        **sums,
        advantage=sum((r.advantage or 0.0) * (r.rows or 0) for r in reports) / rows if rows else None,
        scores=tuple(report.score for report in reports if report.score is not None),
        changed=len(changes),
        changed_alone=changes.count([name]),
        gain=math.fsum(measured) / len(measured) if measured else None,
    )


def _parent(node: Node, nodes: Mapping[str, Node]) -> Node | None:
    """The candidate that it was made from; None for the start and for a merge of several."""
    return nodes.get(node.parents[0]) if len(node.parents) == 1 else None


def _changed(node: Node, nodes: Mapping[str, Node]) -> list[str]:
    """Predictors whose text differs from the parent's."""
    parent = _parent(node, nodes)
    return [] if parent is None else [name for name in node.texts if node.texts[name] != parent.texts.get(name)]


def _gain(node: Node, nodes: Mapping[str, Node]) -> float | None:
    """The anchor score minus the parent's, both in the search that made the candidate."""
    parent = _parent(node, nodes)
    if parent is None or node.born is None:
        return None
    score, before = node.scores.get(node.born), parent.scores.get(node.born)
    return None if score is None or before is None else score - before
