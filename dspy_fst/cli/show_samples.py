"""`dspy-fst show RUN --samples N [--failed]`: sampled replies of a run, with their rewards and feedback."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from dspy_fst.cli.printer import Printer
    from dspy_fst.report.run_record import RunRecord
    from dspy_fst.report.samples import Sample, SampleRollout

SAMPLES = 5
"""Samples that are shown by default (ours)."""


def show_samples(run_dir: Path, record: "RunRecord", count: int, *, failed: bool, as_json: bool) -> None:
    """Print the newest samples of a run, or why there are none.

    Args:
        record: The record of the run.
        count: How many at most.
        failed: Only samples that failed or were masked.
        as_json: Print one JSON object: ``samples``, each with its ``step`` or ``search``, and ``recorded``.
    """
    from dspy_fst.report.samples import samples_in
    from dspy_fst.run.directory import read_events

    recorded = samples_in(read_events(run_dir))
    shown = [sample for sample in recorded if sample.rollout.lost or not failed][-count:]
    if as_json:
        data = [{"step": None, "search": None, each.phase: each.number, **asdict(each.rollout)} for each in shown]
        typer.echo(json.dumps({"samples": data, "recorded": len(recorded)}))
        return
    from dspy_fst.cli.printer import Printer

    out = Printer()
    if not shown:
        out.line(_why_none(record, len(recorded)))
        return
    which = ", those that failed or were masked" if failed else ""
    out.line(f"{record.name}: {len(shown)} of {len(recorded)} recorded samples{which}")
    for sample in shown:
        _print(out, sample)


def _why_none(record: "RunRecord", recorded: int) -> str:
    if recorded:
        return f"{record.name}: none of its {recorded} recorded samples failed or was masked; leave out --failed"
    if record.config.get("recorded_samples") == 0:
        return f"{record.name} recorded no replies: recorded_samples is 0 in its recipe; set it to 4 or so"
    if not record.steps and not record.cycles:
        return f"{record.name} recorded no replies: no search and no step is done"
    if not record.steps:
        return f"{record.name} recorded no replies: no step is done, and its release kept none of searches"
    return f"{record.name} recorded no replies: its steps made no groups of rollouts (method {_method(record)})"


def _method(record: "RunRecord") -> str:
    return str(record.config.get("method", "not known"))


def _print(out: "Printer", sample: "Sample") -> None:
    from dspy_fst.formatting.numbers import number

    phase = f"step {sample.number}" if sample.phase == "step" else f"search of cycle {sample.number}"
    rollout = sample.rollout
    earned = f"reward {number(rollout.reward)}" + (f", {rollout.lost}" if rollout.lost else "")
    where = f" in {rollout.failed_in}" if rollout.failed_in else ""
    out.heading(f"{phase}, problem {rollout.problem}, candidate {rollout.candidate}: {earned}{where}")
    for line in _lines(rollout):
        out.line(f"  {line}")


def _lines(rollout: "SampleRollout") -> Iterator[str]:
    for module in rollout.modules:
        given = ", ".join(f"{name}={value!r}" for name, value in (module.inputs or {}).items())
        yield f"{module.name}({given})"
        if module.reply is not None:
            yield f"  reply that did not parse: {_indented(module.reply)}"
        for name, value in (module.outputs or {}).items():
            yield f"  {name}: {_indented(value)}"
    unparsed = {module.reply for module in rollout.modules}
    for call in rollout.calls:
        if call.reply not in unparsed:
            yield f"sampled by {call.predictor or 'a predictor without a name'}{' (cut off)' if call.cut else ''}: " + (
                _indented(call.reply)
            )
    yield f"why: {_indented(rollout.feedback or rollout.lost or 'the metric gave no feedback')}"


def _indented(text: str) -> str:
    return text.replace("\n", "\n      ")
