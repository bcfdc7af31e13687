"""The outcome of a run: a page of text, or tables in a notebook. Made of the run's record alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from dspy_fst.formatting.demo_texts import readable
from dspy_fst.formatting.numbers import DASH, counted, duration, number
from dspy_fst.formatting.tables import TextTable
from dspy_fst.report.run_record import RunRecord, RunWarning
from dspy_fst.report.verdict import NOT_VALIDATED, validations_table, verdict
from dspy_fst.run.phase_reports import CycleReport, StepReport, WarmStartReport


@dataclass(frozen=True)
class Summary:
    """The parts of a summary. ``str()`` gives the page."""

    title: str
    facts: tuple[tuple[str, str], ...]
    """Label and value: how the run ended, the end against the start, what changed, and what it cost."""
    tables: tuple[TextTable, ...]
    """The validations and the population."""
    warnings: tuple[str, ...]

    def show(self) -> "Summary":
        """Print it, except in a notebook: a notebook shows what a cell returns."""
        if not _in_notebook():
            print(self)
        return self

    @property
    def text(self) -> str:
        width = max(len(label) for label, _ in self.facts)
        lines = [f"  {label.ljust(width)}  {value}" for label, value in self.facts]
        warnings = [f"  - {warning}" for warning in self.warnings] or ["  None."]
        return "\n".join([self.title, *lines, *(table.text for table in self.tables), "Warnings", *warnings])

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"<{self.title}; print() shows its summary>"

    def _repr_html_(self) -> str:
        facts = TextTable(self.title, ("", ""), self.facts, words=2).html
        warnings = "".join(f"<li>{escape(warning)}</li>" for warning in self.warnings) or "<li>None.</li>"
        return "\n".join([facts, *(table.html for table in self.tables), f"<p>Warnings</p><ul>{warnings}</ul>"])


def summary_of(record: RunRecord, *, run_dir: Path | None = None) -> Summary:
    """The summary of a run, whether it is finished, goes on or was stopped."""
    validated = [validations_table(record)] if record.validations else []
    return Summary(
        title=f"Run {run_dir or record.name}: {record.state}",
        facts=tuple(_facts(record)),
        tables=(*validated, population_table(record)),
        warnings=tuple(map(_warning, record.warnings)),
    )


def _warning(warning: RunWarning) -> str:
    return warning.text if warning.step is None else f"after step {warning.step}: {warning.text}"


def _facts(record: RunRecord) -> Sequence[tuple[str, str]]:
    costs = record.costs
    spent = (
        f"{costs.rollouts:,} rollouts (searches {costs.search_rollouts:,}, training {costs.training_rollouts:,}), "
        f"{costs.tokens:,} sampled tokens, {costs.reflections:,} reflections"
    )
    outside = f"{costs.validation_rollouts:,} rollouts, {costs.validation_tokens:,} sampled tokens, outside the budget"
    warm = [("warm start", warm_start_words(record.warm_start))] if record.warm_start else []
    return [
        ("ended", record.ended.text if record.ended else DASH),
        *warm,
        ("start and end", verdict(record)),
        ("updates", record.ending.words),
        ("spent", spent),
        ("validation", outside if record.validations else NOT_VALIDATED),
        ("time", duration((record.last or 0.0) - (record.started or 0.0))),
    ]


def warm_start_words(warm: WarmStartReport) -> str:
    """What a warm start learnt, in a line."""
    taught = ", ".join(f"{name} {count:,}" for name, count in warm.pairs.items())
    teacher = f"{counted(warm.teacher_rollouts, 'rollout')} of the teacher, " if warm.teacher_rollouts else ""
    left_out = ", ".join(f"{reason}: {count:,}" for reason, count in warm.left_out.items())
    return (
        f"from {warm.source}: {teacher}{sum(warm.pairs.values()):,} replies ({taught}), "
        f"{counted(warm.updates, 'update')}, {warm.tokens:,} trained tokens, loss {number(warm.first_loss)} to "
        f"{number(warm.last_loss)}" + (f"; left out: {left_out}" if left_out else "")
    )


def population_table(record: RunRecord) -> TextTable:
    """The returned population, or the newest one; best first, with the number of copies."""
    rows = []
    for digest in dict.fromkeys(record.population):
        node = record.by_digest[digest]
        score = node.last_score if node.validation is None else node.validation
        texts = "\n".join(f"{name}: {readable(name, text)}" for name, text in node.texts.items())
        rows.append([digest, number(score), str(record.population.count(digest)), texts])
    columns = ("candidate", "score", "copies", "texts")
    return TextTable("Population, best first", columns, rows, last_is_words=True)


def cycles_table(cycles: Sequence[CycleReport]) -> TextTable:
    """What each search spent and found."""
    columns = ("cycle", "rollouts", "repeats", "reflections", "accepted", "best score", "sampled tokens")
    rows = [
        [
            str(cycle.cycle),
            *(f"{count:,}" for count in (cycle.rollouts, cycle.repeats, cycle.reflections, cycle.proposals_accepted)),
            number(max((score for score in cycle.scores if score is not None), default=None)),
            f"{cycle.sampled_tokens:,}",
        ]
        for cycle in cycles
    ]
    return TextTable("Searches", columns, rows, words=0)


def steps_table(steps: Sequence[StepReport]) -> TextTable:
    """What each update sampled and learnt from."""
    columns = ("step", "cycle", "reward", "KL to start", "entropy", "flat groups", "trained tokens", "weights left")
    return TextTable("Steps", columns, [_step(step) for step in steps], words=0, last_is_words=True)


def _step(step: StepReport) -> list[str]:
    update = step.update
    # An update of an empty batch measured nothing, whatever numbers it holds.
    measured = (update.kl_to_start, update.entropy) if update.tokens else (None, None)
    return [
        *map(str, (step.step, step.cycle)),
        *map(number, (step.reward, *measured)),
        f"{step.counts.get('flat_groups', 0)}/{step.counts.get('groups', 0)}",
        "skipped" if update.skipped else f"{update.tokens:,}",
        step.left,
    ]


def _in_notebook() -> bool:
    from rich.console import Console

    return Console().is_jupyter
