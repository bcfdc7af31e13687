"""Sample rollouts from a run's events: inputs and outputs of each module, sampled replies, and the reward. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dspy_fst.formatting.numbers import number
from dspy_fst.outcomes.outcome import Outcome
from dspy_fst.report.evaluated import as_written
from dspy_fst.run.directory import Event


@dataclass(frozen=True)
class ModuleCall:
    """One module call of a rollout as text: its ``outputs``, or the ``reply`` that did not parse."""

    name: str
    inputs: Mapping[str, str] | None
    outputs: Mapping[str, str] | None
    reply: str | None


@dataclass(frozen=True)
class SampledCall:
    """The reply of one LM call as it was sampled."""

    predictor: str
    reply: str
    cut: bool
    """Whether it was cut off, at ``max_tokens`` or by the end of the context."""


@dataclass(frozen=True)
class SampleRollout:
    """One sample rollout, as `dspy_fst.rollout.summaries` wrote it."""

    problem: int
    candidate: str
    reward: float | None
    feedback: str | None
    mask: str | None
    failure: str | None
    tokens: int | None
    modules: tuple[ModuleCall, ...]
    failed_in: str | None = None
    """The predictor in whose call it failed, if known."""
    calls: tuple[SampledCall, ...] = ()
    """Its last calls; empty in events of older releases."""

    @property
    def lost(self) -> str | None:
        """The label of a rollout that failed or was masked, e.g. ``"failed: parse"``; None for one that was scored."""
        outcome = Outcome.of_fields({"mask": self.mask, "failure": self.failure})
        return None if outcome.kind == "scored" else outcome.label

    @property
    def newest_reply(self) -> tuple[str, str]:
        """The predictor of the last call, and its reply: as sampled if that was recorded, else its outputs."""
        if self.calls:
            return self.calls[-1].predictor or "?", self.calls[-1].reply
        if not self.modules:
            return self.failed_in or "?", ""
        last = self.modules[-1]
        outputs = ", ".join(f"{name}={value}" for name, value in (last.outputs or {}).items())
        return last.name, outputs if last.reply is None else last.reply


def sample_of(data: Event) -> SampleRollout:
    """One of the ``rollouts`` in an event of kind ``trajectories`` or ``search_samples``."""
    modules = tuple(as_written(ModuleCall, module) for module in data["modules"])
    calls = tuple(as_written(SampledCall, call) for call in data.get("calls") or ())
    return as_written(SampleRollout, data, modules=modules, calls=calls)


@dataclass(frozen=True)
class Sample:
    """A sample rollout, and the step or search that made it."""

    phase: Literal["step", "search"]
    number: int
    """Number of the step, or of the search's cycle."""
    rollout: SampleRollout


def samples_in(events: Sequence[Event]) -> list[Sample]:
    """Every sample in a run's events, in order. Earlier releases recorded none of searches."""
    samples = []
    for event in events:
        if event.get("event") == "trajectories":
            samples += [Sample("step", event["step"], sample_of(data)) for data in event["rollouts"]]
        if event.get("event") == "search_samples":
            samples += [Sample("search", event["cycle"], sample_of(data)) for data in event["rollouts"]]
    return samples


IN_A_LINE = 200
"""Longest reply, and longest feedback, in a line of a log, in characters (ours)."""


def sample_line(data: Event) -> str:
    """A sample on one line of bounded length: predictor, candidate, problem, reward, reply and feedback.

    Args:
        data: As for `sample_of`.
    """
    sample = sample_of(data)
    who, reply = sample.newest_reply
    earned = sample.lost or f"reward {number(sample.reward)}"
    why = f"; {_line(sample.feedback)}" if sample.feedback else ""
    return f"{who} under {sample.candidate}, problem {sample.problem}, {earned}: {_line(reply)!r}{why}"


def _line(text: str) -> str:
    """The text on one line, its end cut off where it is too long."""
    words = " ".join(text.split())
    return words if len(words) <= IN_A_LINE else f"{words[: IN_A_LINE - 4]} ..."
