"""How many rollouts ended in which way, as events count them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from dspy_fst.outcomes.outcome import Kind, Outcome


@dataclass(frozen=True)
class OutcomeCounts:
    """Failed and masked rollouts by reason. Scored ones are not counted.

    >>> counts = OutcomeCounts.of({"rollouts": 8, "failed: parse": 3, "masked: timeout": 1})
    >>> counts.failed["parse"], counts.masked.total()
    (3, 1)
    """

    labels: Counter[str]
    """Label -> rollouts, e.g. ``{"failed: parse": 3}``, in the order in which they were counted."""

    @classmethod
    def of(cls, counts: Mapping[str, int]) -> "OutcomeCounts":
        """The outcomes among the counts of a report or an event."""
        return cls(Counter({label: count for label, count in counts.items() if Outcome.of_label(label)}))

    @classmethod
    def over(cls, outcomes: Iterable[Outcome]) -> "OutcomeCounts":
        """The outcomes of these rollouts: masked ones first, as events have them."""
        lost = [outcome for outcome in outcomes if outcome.kind != "scored"]
        return cls(Counter(outcome.label for outcome in sorted(lost, key=lambda outcome: outcome.kind == "failed")))

    def items(self) -> Iterator[tuple[Outcome, int]]:
        """(outcome, rollouts), in order."""
        for label, count in self.labels.items():
            if outcome := Outcome.of_label(label):
                yield outcome, count

    @property
    def masked(self) -> Counter[str]:
        """Reason -> rollouts that were not measured."""
        return self._by_reason("masked")

    @property
    def failed(self) -> Counter[str]:
        """Reason -> rollouts that earned a failure score."""
        return self._by_reason("failed")

    def _by_reason(self, kind: Kind) -> Counter[str]:
        return Counter({outcome.reason: count for outcome, count in self.items() if outcome.kind == kind})

    @property
    def words(self) -> str:
        """E.g. ``"masked: timeout x3, failed: parse x1"``; empty when every rollout was scored."""
        return ", ".join(f"{label} x{count}" for label, count in self.labels.items())
