"""What a run's own events tell of its texts and of its machine: lengths, shares, and the seconds of each activity.

Read from ``events.jsonl`` alone. An engine's two rates are found by least squares (non-negative) over all sets of
rollouts that the run timed: searches play few at once, steps many, so what a decoding step takes and what a row takes
can be told apart. The simulation itself says how often each rate counts in a set of rollouts.

What cannot be told from events: a prompt's share of a row's seconds (it is inside), and the start of processes, which
comes before the first event.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

from dspy_fst.config import FSTConfig, make_config
from dspy_fst.errors import ConfigurationError
from dspy_fst.run.directory import Event, read_events
from dspy_fst.sizing.rates import EngineRates, MachineRates
from dspy_fst.sizing.simulate import simulate
from dspy_fst.sizing.workload import ACCEPTED, LIVE, Act, Acts, Lengths, Texts

TIMED = ("plan", "validation", "cycle", "step")
"""Kinds of events from one of which to the next an activity of the run lasts."""
UNIT = {"a step": EngineRates(1.0, 0.0), "a row": EngineRates(0.0, 1.0)}
"""Engines that tell how often each of the two rates counts."""


@dataclass(frozen=True)
class MeasuredRun:
    """One run's events, and the time from one to the next."""

    events: Sequence[Event]
    config: FSTConfig
    model: str
    in_process: bool

    @cached_property
    def steps(self) -> list[tuple[Event, float]]:
        """(report, seconds since the timed event before)."""
        return self._after("step")

    @cached_property
    def searches(self) -> list[tuple[Event, float]]:
        return self._after("cycle")

    @cached_property
    def validations(self) -> list[tuple[Event, float]]:
        return self._after("validation")

    @property
    def valset(self) -> int:
        """Problems that its validations measured; 0 without any."""
        return max((len(row) for report, _ in self.validations for row in report["rewards"]), default=0)

    @cached_property
    def seconds(self) -> float:
        """From the plan to the end."""
        times = [event["time"] for event in self.events if event["event"] in (*TIMED, "done")]
        return max(times) - min(times)

    @cached_property
    def texts(self) -> Texts:
        """Of its steps."""
        reports = [report for report, _ in self.steps]
        rollouts = sum(report["counts"]["rollouts"] for report in reports)
        calls = sum(report["counts"].get("calls", report["counts"]["rollouts"]) for report in reports)
        rows = sum(report["update"].get("rows") or 0 for report in reports)
        made = rollouts - sum(report["counts"].get("reused", 0) for report in reports)
        mean = sum(report["sampled_tokens"] for report in reports) / (calls * made / rollouts)
        read = sum(report["update"].get("row_tokens") or 0 for report in reports)
        proposals = sum(report["reflections"] for report, _ in self.searches)
        groups = sum(report["counts"].get("groups", 0) for report in reports)
        plain = Texts(
            self._replies(reports, mean),
            prompt=max(1.0, read / rows - mean) if rows and read else mean,
            calls=calls / rollouts,
            accepted=self._accepted / proposals if proposals else ACCEPTED,
            live=sum(report["counts"].get("live_groups", 0) for report in reports) / groups if groups else LIVE,
        )
        told = [tokens for report in reports if (tokens := report["update"].get("tokens_read"))]
        counted = Acts(self.config, plain).update_tokens * len(reports)
        return replace(plain, read=sum(told) / counted) if told and counted else plain

    @property
    def _accepted(self) -> int:
        return sum(report["proposals_accepted"] for report, _ in self.searches)

    @cached_property
    def rates(self) -> MachineRates:
        """Of the run's own machine.

        Raises:
            ConfigurationError: simpy is not installed.
        """
        updates = [(report, report["seconds"].get("update")) for report, _ in self.steps]
        points = [
            ((1.0, float(report["update"].get("tokens_read") or report["update"]["tokens"])), seconds)
            for report, seconds in updates
            if seconds and report["update"]["rows"]
        ]
        update_s, update_token_s = non_negative(points)
        step_s, row_s = non_negative(self._sampled())
        published = [seconds for report, _ in self.steps if (seconds := report["seconds"].get("publish"))]
        return MachineRates(
            EngineRates(step_s, row_s, joins=not self.in_process),
            reflection_s=self._reflection_s,
            update_s=update_s,
            update_token_s=update_token_s,
            publish_s=median(published) if published else 0.0,
            rest_s=fmean(wall - sum(report["seconds"].values()) for report, wall in self.steps) if self.steps else 0.0,
        )

    @property
    def _reflection_s(self) -> float:
        """What searches took beside their rollouts, for each set of reflections that was asked for together."""
        beside = sum(wall - report["seconds"] for report, wall in self.searches)
        asked = sum(-(-report["reflections"] // self.config.proposals_at_once) for report, _ in self.searches)
        return max(0.0, beside / asked) if asked else 0.0

    def _sampled(self) -> list[tuple[tuple[float, float], float]]:
        """(how often a decoding step and a row's step counted, seconds) of each set of rollouts that was timed."""
        acts = Acts(self.config, self.texts)
        found = []
        for report, _ in self.steps:
            count = report["counts"]["rollouts"] - report["counts"].get("reused", 0)
            found.append(self._point([acts.play("rollouts", count)], report["seconds"]["sampling"]))
        for report, _ in self.validations:
            if count := report["counts"]["rollouts"]:
                found.append(self._point([acts.play("validation", count)], report["seconds"]))
        for report, _ in self.searches:
            found.append(self._point(self._plays(acts, report), report["seconds"]))
        return [point for point in found if point[1] > 0]

    def _plays(self, acts: Acts, report: Event) -> list[Act]:
        """A search's rollouts as they were played together: as many reflections and acceptances as it reports."""
        batch, anchors = self.config.reflection_minibatch, len(acts.plan.anchors(0))
        proposals, accepted, at_once = (
            report["reflections"],
            report["proposals_accepted"],
            self.config.proposals_at_once,
        )
        scored = report["rollouts"] - proposals * batch - accepted * (anchors - batch)
        together, rest = divmod(proposals, at_once)
        sets = [at_once * batch] * together + [rest * batch] + [anchors - batch] * accepted + [scored]
        return [acts.play("search", count) for count in sets if count > 0]

    def _point(self, plays: Sequence[Act], seconds: float) -> tuple[tuple[float, float], float]:
        counts = [
            self._counted(plays, EngineRates(e.step_s, e.row_s, joins=not self.in_process)) for e in UNIT.values()
        ]
        return (counts[0], counts[1]), seconds

    def _counted(self, plays: Sequence[Act], engine: EngineRates) -> float:
        return simulate(plays, MachineRates(engine), self.config.num_threads).total

    def _replies(self, reports: Sequence[Mapping[str, object]], mean: float) -> Lengths:
        """Deciles of the steps' replies, averaged over steps; around the mean where an older release told none."""
        told = [deciles for report in reports if (deciles := report.get("reply_deciles"))]
        if not told:
            return Lengths.around(mean)
        return Lengths(tuple(fmean(column) for column in zip(*told, strict=True)))

    def _after(self, kind: str) -> list[tuple[Event, float]]:
        timed = [event for event in self.events if event["event"] in TIMED]
        return [
            (event["report"], event["time"] - before["time"])
            for before, event in pairwise(timed)
            if event["event"] == kind
        ]


def non_negative(points: Sequence[tuple[tuple[float, float], float]]) -> tuple[float, float]:
    """The two rates that explain the seconds best, by relative error; both 0 where nothing was timed.

    >>> [round(rate, 6) for rate in non_negative([((1, 10), 12), ((2, 5), 9)])]
    [2.0, 1.0]
    """
    from scipy.optimize import nnls

    if not points:
        return 0.0, 0.0
    rates, _ = nnls([[count / seconds for count in counts] for counts, seconds in points], [1.0] * len(points))
    return float(rates[0]), float(rates[1])


def measured_run(run_dir: Path) -> MeasuredRun:
    """Read a run's events.

    Raises:
        ConfigurationError: there is no run, or it has not made a step.
    """
    events = read_events(run_dir)
    plan = next((event for event in events if event["event"] == "plan" and "config" in event), None)
    if plan is None:
        raise ConfigurationError([f"like={str(run_dir)!r}: there is no run with events; name a run's directory"])
    if not any(event["event"] == "step" and event["report"]["sampled_tokens"] for event in events):
        raise ConfigurationError(
            [f"like={str(run_dir)!r}: the run has made no step with replies, which would be timed"]
        )
    config, faults = make_config(plan["config"])
    if config is None:
        raise ConfigurationError([f"like={str(run_dir)!r}: its recipe is not one of today's: {'; '.join(faults)}"])
    in_process = plan.get("engine") == "in_process"
    return MeasuredRun(events, config, str(plan.get("model", "the run's model")), in_process)
