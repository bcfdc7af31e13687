"""One self-contained HTML page of a run, or of several runs side by side. Made of their records alone."""

import os
from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from dspy_fst.config import FSTConfig
from dspy_fst.errors import ConfigurationError
from dspy_fst.formatting.demo_texts import readable
from dspy_fst.formatting.numbers import DASH, counted, duration, interval, number, plain, share, signed, with_error
from dspy_fst.formatting.tables import TextTable
from dspy_fst.report import NEEDS_EXTRA
from dspy_fst.report.charts import chart_svg, lineage_svg
from dspy_fst.report.costs import PARTS, REFLECTION_LM, labels_of
from dspy_fst.report.diff import text_diff
from dspy_fst.report.from_directory import read_records
from dspy_fst.report.lineage import Node
from dspy_fst.report.measures import Chart, health_charts, learning_charts, lost_charts, predictor_charts
from dspy_fst.report.run_record import RunRecord, best
from dspy_fst.report.step_options import option_charts
from dspy_fst.report.verdict import validations_table, verdict

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
except ImportError as error:
    raise ImportError(NEEDS_EXTRA) from error

METHODS = {
    "fst": "Fast-Slow Training",
    "rl": "weights only (RL)",
    "gepa": "instructions only (GEPA)",
    "gepa_then_rl": "GEPA, then RL",
    "distill": "FST-distill",
    "rl_then_gepa": "RL, then GEPA",
}


def build_report(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the page of a run, or of several compared, to the file ``out``.

    The runs may have just started, go on, or have been killed. The same events give the same page.

    Raises:
        ConfigurationError: ``out`` is a folder, or cannot be written.
        RunDirectoryError: a folder is not the directory of a run.
    """
    html, out = render(read_records(run_dirs)), Path(out)
    new = out.parent / f"{out.name}.new"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(html, encoding="utf-8", errors="replace")  # a model's text may hold a lone surrogate
        os.replace(new, out)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        raise ConfigurationError([f"{out} cannot be written: {error}; name a file that can be written"]) from error
    return out


def render(records: Sequence[RunRecord]) -> str:
    """The page as text. Every text of the runs is escaped, and a content security policy forbids everything else."""
    environment = Environment(
        loader=PackageLoader("dspy_fst.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "count": count, "setting": setting, "plain": plain}
    environment.globals |= {"text_diff": text_diff, "readable": readable, "dash": DASH, "counted": counted}
    environment.globals |= {"interval": interval, "share": share, "with_error": with_error, "change": change}
    style, script = (_asset(environment, name) for name in ("style.css", "script.js"))
    runs = [Run(f"run-{i}", record) for i, record in enumerate(records, start=1)]
    return environment.get_template("report.html").render(
        title=f"Run {records[0].name}" if len(records) == 1 else f"{len(records)} runs compared",
        runs=runs,
        learning=_drawn(learning_charts(records)),
        health=_drawn([*health_charts(records), *option_charts(records)]),
        lost=_drawn(lost_charts(records)),
        earned=_drawn(predictor_charts(records)),
        costs=cost_rows(records),
        recipe=recipe_rows(records),
        style=style,
        script=script,
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
    )


def _asset(environment: Environment, name: str) -> Markup:
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])


# ---- what the template shows -------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A number at the head of the page."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Run:
    """A record, and what the template shows of it."""

    key: str
    """Prefix of its ids, e.g. ``"run-1"``."""
    record: RunRecord

    def id(self, node: Node) -> str:
        return f"{self.key}-{node.digest}"

    @cached_property
    def method(self) -> str:
        method = str(self.record.config.get("method", "a run"))
        return METHODS.get(method, method)

    @cached_property
    def when(self) -> str:
        return period(self.record.started, self.record.last)

    @cached_property
    def lineage(self) -> Markup | None:
        svg = lineage_svg(self.record, f"{self.key}-lineage", lambda node: f"#{self.id(node)}")
        return None if svg is None else Markup(svg)

    @cached_property
    def tree(self) -> list[tuple[Node, int]]:
        """Candidates with their depth, in depth-first order of the tree of first parents."""
        children = defaultdict(list)
        for node in self.record.nodes:
            children[node.parents[0] if node.parents else None].append(node)
        order, waiting = [], [(node, 0) for node in reversed(children[None])]
        while waiting:
            node, depth = waiting.pop()
            order.append((node, depth))
            waiting += [(child, depth + 1) for child in reversed(children[node.digest])]
        return order

    @cached_property
    def scale(self) -> float:
        """The score of a full bar."""
        return max([1.0, *(score or 0.0 for node in self.record.nodes for score in node.scores.values())])

    @property
    def members(self) -> list[str]:
        """Digests of the population, without copies."""
        return list(dict.fromkeys(self.record.population))

    def rewarded(self, step: int) -> str:
        """The step's mean reward."""
        return number(next((report.reward for report in self.record.steps if report.step == step), None))

    @property
    def verdict(self) -> str:
        return verdict(self.record)

    @property
    def validations(self) -> TextTable:
        return validations_table(self.record)

    @property
    def evaluated(self) -> bool:
        return bool(self.record.two_by_two or self.record.evaluations)

    @cached_property
    def figures(self) -> list[Figure]:
        record, costs = self.record, self.record.costs
        return [
            Figure("Training reward", change(record.rewards), "first and last update"),
            Figure("Anchor score", change([*record.carried[:1], *record.found[-1:]]), "carried in first, found last"),
            Figure("Validation", _validated(record), "start and end, best candidate"),
            Figure("Updates", _out_of(costs.updates, record.budget.get("updates")), "weights moved"),
            Figure("Searches", _out_of(len(record.cycles), record.budget.get("searches")), "instructions evolved"),
            Figure(
                "Rollouts", _out_of(costs.rollouts, _planned(record.budget)), "searches, scoring, training; of at most"
            ),
        ]


@dataclass(frozen=True)
class Drawn:
    """A chart, its drawing and its numbers."""

    chart: Chart
    svg: Markup
    rows: Sequence[tuple[str, Sequence[str]]]
    """x, and the y of each series."""


def _drawn(charts: Sequence[Chart]) -> list[Drawn]:
    return [Drawn(chart, Markup(chart_svg(chart, chart.name)), list(_numbers(chart))) for chart in charts]


def _numbers(chart: Chart) -> Iterator[tuple[str, list[str]]]:
    for place in sorted({x for series in chart.series for x in series.x}):
        values = [[f"{y:.4g}" for x, y in zip(s.x, s.y, strict=True) if x == place] for s in chart.series]
        yield f"{place:,.6g}", [", ".join(numbers) or DASH for numbers in values]


def cost_rows(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """What was spent: a label, and the value of each run. Labels of parts begin with a small letter."""
    rows = [
        (label if name in PARTS else label.capitalize(), [count(record.costs.count(name)) for record in records])
        for name, label in labels_of(*(record.costs for record in records)).items()
    ]
    if any(record.costs.reflection_lm.calls for record in records):
        asked = [record.costs.reflection_lm for record in records]
        rows.append((REFLECTION_LM.capitalize(), [lm.words if lm.calls else DASH for lm in asked]))
    activities = dict.fromkeys(activity for record in records for activity in record.costs.seconds)
    rows += [
        (f"Time: {activity}", [duration(record.costs.seconds.get(activity, 0.0), 1) for record in records])
        for activity in activities
    ]
    return rows


@dataclass(frozen=True)
class Setting:
    """One setting of the recipe, and its value in each run."""

    name: str
    default: object
    values: Sequence[object]

    @property
    def changed(self) -> bool:
        """Whether any run has a value other than the default."""
        return any(value != self.default for value in self.values)


def recipe_rows(records: Sequence[RunRecord]) -> list[Setting]:
    """Every setting of the runs. A default or a value of None is shown as a dash."""
    defaults = FSTConfig.model_construct().model_dump(mode="json")
    names = dict.fromkeys(name for record in records for name in record.config)
    return [Setting(name, defaults.get(name), [record.config.get(name) for record in records]) for name in names]


# ---- numbers as people read them ---------------------------------------------------------------


def count(value: int | None) -> str:
    return DASH if value is None else f"{value:,}"


def period(start: float | None, end: float | None) -> str:
    """From one time to another, in UTC: a page reads the same wherever it is made.

    >>> period(0.0, 90.0), period(0.0, 90_000.0)
    ('1970-01-01, 00:00 to 00:01 UTC', '1970-01-01, 00:00 to 1970-01-02, 01:00 UTC')
    """
    if start is None or end is None:
        return DASH
    first, last = (datetime.fromtimestamp(seconds, UTC) for seconds in (start, end))
    day = "" if first.date() == last.date() else f"{last:%Y-%m-%d}, "
    return f"{first:%Y-%m-%d, %H:%M} to {day}{last:%H:%M} UTC"


def setting(value: object) -> str:
    if value is None:
        return DASH
    return ", ".join(map(setting, value)) if isinstance(value, list | tuple) else f"{value}"


def change(values: Sequence[float | None]) -> str:
    """The first and the last value.

    >>> change([0.25, 0.5, 0.75])
    '0.250 → 0.750'
    """
    return " → ".join(map(number, [*values[:1], *values[1:][-1:]])) or DASH


def _validated(record: RunRecord) -> str:
    if record.validations:
        start, newest = record.start_validated, record.validations[-1]
        return change([start.score if start else None, newest.score])
    return number(best([node.validation for node in record.nodes]))


def _out_of(done: int, planned: int | None) -> str:
    return count(done) if planned is None else f"{count(done)} of {count(planned)}"


def _planned(budget: Mapping[str, int]) -> int | None:
    parts = [budget.get(name) for name in ("search_rollouts", "scoring_rollouts", "training_rollouts")]
    return None if None in parts else sum(part or 0 for part in [*parts, budget.get("overshoot_rollouts")])
