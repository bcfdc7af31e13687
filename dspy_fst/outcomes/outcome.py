"""One rollout's outcome, and the label that stands for it on disk."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["scored", "failed", "masked"]
PARSE, CONTEXT = "parse", "context"
"""Reasons of a failure that other rooms ask about: a reply that does not parse, a prompt that overflows the context."""
SEPARATOR = ": "


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
    def of_fields(cls, data: Mapping[str, Any]) -> "Outcome":
        """The outcome that `as_fields` wrote; a field that is missing is None."""
        detail = data.get("feedback") or ""
        if mask := data.get("mask"):
            return cls("masked", mask, detail)
        return cls("failed", failure, detail) if (failure := data.get("failure")) else cls("scored", detail=detail)
