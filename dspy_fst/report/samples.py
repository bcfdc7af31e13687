"""Sample rollouts of a run as its events hold them: what went into each module, what came out, what it earned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dspy_fst.formatting.numbers import number
from dspy_fst.outcomes.outcome import Outcome
from dspy_fst.report.evaluated import as_written
from dspy_fst.run.directory import Event


@dataclass(frozen=True)
class Module:
    """One module call of a rollout as people read it: ``outputs``, or the ``reply`` that did not parse."""

    name: str
    inputs: Mapping[str, str] | None
    outputs: Mapping[str, str] | None
    reply: str | None


@dataclass(frozen=True)
class Said:
    """One call's reply as it was sampled."""

    predictor: str
    reply: str
    cut: bool
    """Whether it was cut off, at ``max_tokens`` or by the end of the context."""


@dataclass(frozen=True)
class Played:
    """One sample rollout; see `dspy_fst.rollout.summaries`."""

    problem: int
    candidate: str
    reward: float | None
    feedback: str | None
    mask: str | None
    failure: str | None
    tokens: int | None
    modules: tuple[Module, ...]
    failed_in: str | None = None
    """The predictor in whose call it failed, where one is known."""
    calls: tuple[Said, ...] = ()
    """Its last calls; none in events of older releases."""

    @property
    def lost(self) -> str | None:
        """The label of a rollout that failed or was masked, e.g. ``"failed: parse"``; None for one that was scored."""
        outcome = Outcome.of_fields({"mask": self.mask, "failure": self.failure})
        return None if outcome.kind == "scored" else outcome.label

    @property
    def newest_reply(self) -> tuple[str, str]:
        """The predictor that spoke last, and what it said: as it was sampled, where that is kept."""
        if self.calls:
            return self.calls[-1].predictor or "?", self.calls[-1].reply
        if not self.modules:
            return self.failed_in or "?", ""
        last = self.modules[-1]
        said = last.reply if last.reply is not None else ", ".join(f"{k}={v}" for k, v in (last.outputs or {}).items())
        return last.name, said


def played(data: Event) -> Played:
    """The sample that an event holds."""
    modules = tuple(as_written(Module, module) for module in data["modules"])
    return as_written(
        Played, data, modules=modules, calls=tuple(as_written(Said, said) for said in data.get("calls") or ())
    )


@dataclass(frozen=True)
class Sample:
    """A sample, and where in the run it was played."""

    of: Literal["step", "search"]
    number: int
    """Of the step, or of the search's cycle."""
    played: Played


def samples_in(events: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """Every sample of a run's events, in order; earlier releases kept none of searches."""
    found = []
    for event in events:
        if event.get("event") == "trajectories":
            found += [Sample("step", event["step"], played(of)) for of in event["rollouts"]]
        if event.get("event") == "search_samples":
            found += [Sample("search", event["cycle"], played(of)) for of in event["rollouts"]]
    return found


IN_A_LINE = 200
"""Characters of a reply, and of the reason for its reward, in a line of a log (ours)."""


def sample_line(data: Event) -> str:
    """A sample on one line of bounded length: who said what under which candidate, what it earned and why.

    Args:
        data: The sample as an event holds it.
    """
    sample = played(data)
    who, reply = sample.newest_reply
    earned = sample.lost or f"reward {number(sample.reward)}"
    why = f"; {_line(sample.feedback)}" if sample.feedback else ""
    return f"{who} under {sample.candidate}, problem {sample.problem}, {earned}: {_line(reply)!r}{why}"


def _line(text: str) -> str:
    """The text on one line, its end left out where it is long."""
    words = " ".join(text.split())
    return words if len(words) <= IN_A_LINE else f"{words[: IN_A_LINE - 4]} ..."
