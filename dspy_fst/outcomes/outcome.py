"""One rollout's outcome, the label that stands for it on disk, and counts of many."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["scored", "failed", "masked"]
PARSE, CONTEXT = "parse", "context"
"""Reasons of a failure that other rooms ask about: a reply that does not parse, a prompt that overflows the context."""
SEPARATOR = ": "
REUSED = "reused "
"""Begins the labels of a step's rollouts that its search made, and counted too."""


@dataclass(frozen=True)
class Outcome:
    """How one rollout ended.

    >>> Outcome("failed", "parse", "Expected to find output field: answer").label
    'failed: parse'
    """

    kind: Kind
    """``"scored"``: the metric gave the reward. ``"failed"``: the policy is at fault, and the reward is a failure
    score. ``"masked"``: the policy was not measured, so there is no reward."""
    reason: str = ""
    """Why it failed or was masked, e.g. ``"parse"``, ``"outage: ConnectionError"``; empty when it was scored."""
    detail: str = ""
    """The metric's feedback, or the message of the error. Labels leave it out."""

    def __post_init__(self) -> None:
        if (self.kind == "scored") != (not self.reason):
            raise ValueError(f"an outcome has a reason exactly when it is not scored: {self.kind!r}, {self.reason!r}")

    @property
    def label(self) -> str:
        """``"scored"``, ``"failed: <reason>"`` or ``"masked: <reason>"``: the name of its count in events."""
        return f"{self.kind}{SEPARATOR}{self.reason}" if self.reason else self.kind

    @classmethod
    def of_label(cls, label: str) -> "Outcome | None":
        """The failed or masked outcome that a label names; None for any other count.

        >>> Outcome.of_label("masked: lm: EngineError").reason
        'lm: EngineError'
        >>> Outcome.of_label("groups") is None
        True
        """
        kind, _, reason = label.partition(SEPARATOR)
        if not reason:
            return None
        return cls("failed", reason) if kind == "failed" else cls("masked", reason) if kind == "masked" else None

    @property
    def mask(self) -> str | None:
        """The reason of a masked outcome; else None."""
        return self.reason if self.kind == "masked" else None

    @property
    def failure(self) -> str | None:
        """The reason of a failed outcome; else None."""
        return self.reason if self.kind == "failed" else None

    def as_fields(self) -> dict[str, str | None]:
        """The fields of a rollout in JSON: ``feedback``, ``mask`` and ``failure``."""
        return {"feedback": self.detail, "mask": self.mask, "failure": self.failure}

    @classmethod
    def of_fields(cls, data: Mapping[str, str | None]) -> "Outcome":
        """The outcome that `as_fields` wrote; a field that is missing is None."""
        detail = data.get("feedback") or ""
        if mask := data.get("mask"):
            return cls("masked", mask, detail)
        return cls("failed", failure, detail) if (failure := data.get("failure")) else cls("scored", detail=detail)


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

    @classmethod
    def made_for(cls, counts: Mapping[str, int]) -> "OutcomeCounts":
        """As `of`, without the outcomes of reused rollouts.

        >>> OutcomeCounts.made_for({"failed: parse": 3, "reused failed: parse": 2}).labels
        Counter({'failed: parse': 1})
        """
        labels = cls.of(counts).labels
        return cls(labels - Counter({label: counts.get(f"{REUSED}{label}", 0) for label in labels}))

    @property
    def as_reused(self) -> dict[str, int]:
        """The counts that `made_for` leaves out."""
        return {f"{REUSED}{label}": count for label, count in self.labels.items()}

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
