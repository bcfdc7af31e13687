"""A run's events -> its record. The only reader of events for charts, pages and tables. Pure.

Any prefix of a run's events gives a record: of a run that has just started, goes on, or was killed. Numbers that were
not measured are None. Fields that an earlier release did not write are None, too.
"""

from collections.abc import Iterator, Sequence

from dspy_fst.report.costs import step_rollouts
from dspy_fst.report.evaluated import as_written, evaluated_of, evaluations_in, two_by_two_of
from dspy_fst.report.lineage import lineage_of, members, with_texts
from dspy_fst.report.run_record import RunningTotal, RunRecord, RunWarning
from dspy_fst.report.samples import sample_of
from dspy_fst.run.directory import Event
from dspy_fst.run.ending import stop_reason_in
from dspy_fst.run.phase_reports import CycleReport, StepReport, WarmStartReport, renamed
from dspy_fst.run.validated import validated_in
from dspy_fst.types import AdapterReport, PredictorReport, UpdateReport


def record_of(
    events: Sequence[Event], *, name: str = "run", evaluations: Sequence[str] = (), in_use: bool = False
) -> RunRecord:
    """The record of a run whose events are known so far.

    Args:
        evaluations: Lines of ``evaluations.jsonl``.
        in_use: Whether a process works on the run now.
    """
    plan: Event = next(reversed(_of_kind(events, "plan")), {})
    done: Event = next(reversed(_of_kind(events, "done")), {})
    times = [event["time"] for event in events if event.get("time") is not None]
    paid = [event["dollars"] for event in _of_kind(events, "cycle") if event.get("dollars") is not None]
    cycles = tuple(_cycle(event["report"]) for event in _of_kind(events, "cycle"))
    evaluated = list(evaluations_in(evaluations))
    nodes, validations = lineage_of(_of_kind(events, "cycle"), done), validated_in(events)
    final = [node.digest for texts in members(done) if (node := with_texts(nodes.values(), texts))]
    return RunRecord(
        name=name,
        state="finished" if done else "running" if in_use else "stopped",
        started=min(times, default=None),
        last=done.get("time") or max(times, default=None),  # compiled again, a finished run took no longer
        config=plan.get("config") or {},
        budget=plan.get("budget") or {},
        warnings=tuple(_warnings(events)),
        warm_start=next((as_written(WarmStartReport, e["report"]) for e in _of_kind(events, "warm_start")), None),
        cycles=cycles,
        steps=tuple(_step(event["report"]) for event in _of_kind(events, "step")),
        spent=tuple(_running_totals(events)),
        nodes=tuple(nodes.values()),
        population=tuple(final) if done else cycles[-1].population if cycles else (),
        trajectories={
            event["step"]: tuple(map(sample_of, event["rollouts"])) for event in _of_kind(events, "trajectories")
        },
        weights=done.get("weights"),
        validations=tuple(validations),
        returned=next((state for state in validations if state.index == done.get("returned")), None),
        ended=stop_reason_in(events),
        two_by_two=next((table for data in reversed(evaluated) if (table := two_by_two_of(data))), None),
        evaluations=tuple(evaluation for data in evaluated if (evaluation := evaluated_of(data))),
        reflection_dollars=sum(paid) if paid else None,
    )


def _of_kind(events: Sequence[Event], kind: str) -> list[Event]:
    return [event for event in events if event.get("event") == kind]


def _cycle(report: Event) -> CycleReport:
    report = renamed(report)
    return as_written(CycleReport, report, scores=tuple(report["scores"]), population=tuple(report["population"]))


def _step(report: Event) -> StepReport:
    predictors = {name: as_written(PredictorReport, data) for name, data in (report.get("predictors") or {}).items()}
    learnt = report["update"]
    adapters = {name: as_written(AdapterReport, data) for name, data in (learnt.get("adapters") or {}).items()}
    taken = learnt.get("optimizer_steps", int(learnt["rows"] > 0))  # an older release took one at most
    update = as_written(UpdateReport, learnt, adapters=adapters, optimizer_steps=taken)
    return as_written(StepReport, report, update=update, predictors=predictors)


def _warnings(events: Sequence[Event]) -> Iterator[RunWarning]:
    """Warnings of the rules that watch the run, and notes that begin with ``warning:``."""
    for event in events:
        text = event.get("text", "")
        if event.get("event") == "warning" or (event.get("event") == "note" and text.startswith("warning: ")):
            yield RunWarning(event.get("step"), text.removeprefix("warning: "))


def _running_totals(events: Sequence[Event]) -> Iterator[RunningTotal]:
    """One total for each step."""
    rollouts = tokens = 0
    for event in events:
        kind, report = event.get("event"), event.get("report", {})
        if kind in ("cycle", "step"):
            rollouts += report["rollouts"] if kind == "cycle" else step_rollouts(report["counts"])
            tokens += report["sampled_tokens"]
        if kind == "step":
            yield RunningTotal(rollouts, tokens)
