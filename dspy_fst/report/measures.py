"""The charts of runs as data: their points, titles and labels, before anything is drawn. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from dspy_fst.outcomes.outcome import OutcomeCounts
from dspy_fst.report.run_record import RunRecord
from dspy_fst.types import AdapterReport, PredictorReport

T = TypeVar("T")
Points = tuple[Sequence[float], Sequence[float | None]]
"""x and y of each point. A y of None was not measured."""
Lines = Mapping[str, Callable[[RunRecord], Points]]
REASONS = 6
"""Most reasons in a chart of lost rollouts. The rarer ones are summed up as "other reasons"."""


@dataclass(frozen=True)
class Series:
    """One line, one set of points, or one layer of a stack."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Chart:
    """What one chart shows."""

    name: str
    """Name of its file, e.g. ``"reward-by-update"``."""
    title: str
    note: str
    """How to read it."""
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    kind: Literal["line", "stack", "frontier"] = "line"
    span: tuple[float, float | None] | None = None
    """Lower and upper end of the y axis, where they have a meaning."""

    @property
    def summary(self) -> str:
        """The chart in words, for screen readers."""
        return f"{self.y_label} against {self.x_label}. " + " ".join(map(_in_words, self.series))


@dataclass(frozen=True)
class Measure:
    """A quantity that can be drawn for one run, or for several runs in one chart."""

    name: str
    title: str
    note: str
    x_label: str
    y_label: str
    lines: Lines
    """Label -> points. With several runs only the first line of each is drawn."""
    kind: Literal["line", "frontier"] = "line"
    span: tuple[float, float | None] | None = None

    def chart(self, records: Sequence[RunRecord]) -> Chart:
        if len(records) == 1:
            drawn = [_series(label, *points(records[0])) for label, points in self.lines.items()]
        else:
            points = next(iter(self.lines.values()))
            drawn = [_series(record.name, *points(record)) for record in records]
        return Chart(self.name, self.title, self.note, self.x_label, self.y_label, tuple(drawn), self.kind, self.span)


def learning_charts(records: Sequence[RunRecord]) -> list[Chart]:
    """What the runs learnt, and what it cost."""
    return _measured([measure.chart(records) for measure in LEARNING])


def health_charts(records: Sequence[RunRecord]) -> list[Chart]:
    """Whether the updates were healthy."""
    live = groups(records[0]) if len(records) == 1 else LIVE.chart(records)
    return _measured([*(measure.chart(records) for measure in HEALTH), live])


def lost_charts(records: Sequence[RunRecord]) -> list[Chart]:
    """Masked and failed rollouts."""
    if not any(record.lost for record in records):
        return []
    if len(records) > 1:
        return _measured([LOST.chart(records)])
    charts = [lost_in_steps(records[0]), lost_in_searches(records[0])]
    return [chart for chart in charts if any(any(series.y) for series in chart.series)]


def predictor_charts(records: Sequence[RunRecord]) -> list[Chart]:
    """The predictors of one run, update by update. With several runs there is no such chart."""
    if len(records) > 1 or len(records[0].predictors) < 2:
        return []
    return _measured([positive_rows(records[0]), own_scores(records[0]), *adapter_charts(records[0])])


def adapter_charts(record: RunRecord) -> list[Chart]:
    """The LoRA adapters of a run that has several, update by update."""

    def chart(name: str, title: str, note: str, y_label: str, value: Callable[[AdapterReport], float | None]) -> Chart:
        reports = {adapter: [step.update.adapters.get(adapter) for step in record.steps] for adapter in record.adapters}
        return Chart(name, title, note, "update", y_label, _by_name(record, reports, value))

    kl_note = "Exact KL to the starting weights on the tokens that were trained through it."
    return [
        chart("adapter-kl", "Distance of each LoRA adapter", kl_note, "KL, nats a token", lambda of: of.distance),
        chart("adapter-norm", "Gradient norm of each", "Before clipping.", "gradient norm", lambda of: of.grad_norm),
    ]


def _predictor_chart(
    record: RunRecord, name: str, title: str, note: str, y_label: str, value: Callable[[PredictorReport], float | None]
) -> Chart:
    predictors = [totals.predictor for totals in record.predictors]
    reports = {predictor: [step.predictors.get(predictor) for step in record.steps] for predictor in predictors}
    return Chart(name, title, note, "update", y_label, _by_name(record, reports, value))


def positive_rows(record: RunRecord) -> Chart:
    title = "Calls that were above the others"
    note = "Share of a predictor's learnt calls whose advantage is positive: they scored above the group's mean."

    def share(report: PredictorReport) -> float | None:
        return report.positive_rows / report.rows if report.rows else None

    return replace(
        _predictor_chart(record, "predictor-positive", title, note, "share of calls", share), span=(0.0, 1.05)
    )


def own_scores(record: RunRecord) -> Chart:
    note = "What the metric gave a predictor by itself; a failed rollout counts with its failure score."
    title = "Scores of single predictors"
    return _predictor_chart(record, "predictor-scores", title, note, "mean score", lambda report: report.score)


def _by_name(
    record: RunRecord, reports: Mapping[str, Sequence[T | None]], value: Callable[[T], float | None]
) -> tuple[Series, ...]:
    """A line for each name with at least one measured point. A step without a report measured nothing."""
    lines = [
        _series(name, _steps(record), [None if report is None else value(report) for report in own])
        for name, own in reports.items()
    ]
    return tuple(line for line in lines if line.y)


def frontier(series: Series) -> Series:
    """The points with a higher y than every point at a smaller or equal x, sorted by x."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(zip(series.x, series.y, strict=True), key=lambda point: (point[0], -point[1])):
        if not kept or y > kept[-1][1]:
            kept.append((x, y))
    return Series(series.label, tuple(x for x, _ in kept), tuple(y for _, y in kept))


def groups(record: RunRecord) -> Chart:
    names = {"live_groups": "live", "flat_groups": "flat", "unmeasured_groups": "not measured"}
    x = tuple(float(step.step) for step in record.steps)
    return Chart(
        name="groups",
        title="Groups of each update",
        note="A group is live when its rewards differ: only then is there something to learn from it.",
        x_label="update",
        y_label="groups",
        series=tuple(
            Series(label, x, tuple(float(step.counts.get(name, 0)) for step in record.steps))
            for name, label in names.items()
        ),
        kind="stack",
    )


def lost_in_steps(record: RunRecord) -> Chart:
    counts = {step.step: step.counts for step in record.steps}
    return _lost("lost-in-updates", "In updates", "update", counts, list(record.lost))


def lost_in_searches(record: RunRecord) -> Chart:
    counts = {cycle.cycle: cycle.counts for cycle in record.cycles}
    return _lost("lost-in-searches", "In searches", "cycle", counts, list(record.lost))


def _lost(
    name: str, title: str, x_label: str, counts: Mapping[int, Mapping[str, int]], reasons: Sequence[str]
) -> Chart:
    """Rollouts by reason. A reason has the same position, and so the same colour, in all charts of a run."""
    layers = {label: [label] for label in reasons[:REASONS]}
    if rare := list(reasons[REASONS:]):
        layers["other reasons"] = rare
    return Chart(
        name=name,
        title=title,
        note="Rollouts that were masked or failed, by reason.",
        x_label=x_label,
        y_label="rollouts",
        series=tuple(
            Series(
                label,
                tuple(map(float, counts)),
                tuple(float(sum(at.get(reason, 0) for reason in members)) for at in counts.values()),
            )
            for label, members in layers.items()
        ),
        kind="stack",
    )


# ---- points ------------------------------------------------------------------------------------


def _rewards(x: Callable[[RunRecord], Sequence[float]]) -> Lines:
    return {"reward": lambda record: (x(record), [step.reward for step in record.steps])}


def _steps(record: RunRecord) -> list[float]:
    return [step.step for step in record.steps]


def _updates(record: RunRecord, name: str) -> list[float | None]:
    """One field of UpdateReport. An update of an empty batch measured nothing, whatever number it holds."""
    return [getattr(step.update, name) if step.update.tokens else None for step in record.steps]


def _by_step(name: str) -> Callable[[RunRecord], Points]:
    return lambda record: (_steps(record), _updates(record, name))


def _reward_by_kl(record: RunRecord) -> Points:
    pairs = zip(_updates(record, "kl_to_start"), record.steps, strict=True)
    known = [(kl, step.reward) for kl, step in pairs if kl is not None]
    return [kl for kl, _ in known], [reward for _, reward in known]


def _share(name: str, whole: str) -> Callable[[RunRecord], Points]:
    def points(record: RunRecord) -> Points:
        return _steps(record), [
            step.counts.get(name, 0) / step.counts[whole] if step.counts.get(whole) else None for step in record.steps
        ]

    return points


def _lost_share(record: RunRecord) -> Points:
    return _steps(record), [
        OutcomeCounts.of(step.counts).labels.total() / step.counts["rollouts"] if step.counts.get("rollouts") else None
        for step in record.steps
    ]


REWARD = "mean training reward"
LEARNING = (
    Measure(
        "reward-by-update",
        "Reward by update",
        "Mean reward of the rollouts that each update learnt from: the population's texts, sampled as in training.",
        "update",
        REWARD,
        _rewards(_steps),
    ),
    Measure(
        "reward-by-rollouts",
        "Reward by rollouts spent",
        "The same against every rollout paid for so far: searches, scoring of carried candidates and training.",
        "rollouts in all",
        REWARD,
        _rewards(lambda record: [spent.rollouts for spent in record.spent]),
    ),
    Measure(
        "reward-by-tokens",
        "Reward by tokens sampled",
        "The same against every token sampled so far, the searches' tokens included.",
        "sampled tokens in all",
        REWARD,
        _rewards(lambda record: [spent.tokens for spent in record.spent]),
    ),
    Measure(
        "anchor-score",
        "Best candidate of each search",
        "Mean score on the cycle's anchors, under the weights of that cycle.",
        "cycle",
        "anchor score",
        {
            "best found": lambda record: ([cycle.cycle for cycle in record.cycles], record.found),
            "best carried in": lambda record: ([cycle.cycle for cycle in record.cycles], record.carried),
        },
    ),
    Measure(
        "reward-by-kl",
        "Reward by distance from the start",
        "One point an update; the line joins those that no update beats at a smaller distance. Up and left is better.",
        "KL to the start, nats a token",
        REWARD,
        {"updates": _reward_by_kl},
        kind="frontier",
    ),
    Measure(
        "kl-by-update",
        "Distance from the start",
        "Exact KL to the starting weights on the tokens that were trained.",
        "update",
        "KL, nats a token",
        {"KL": _by_step("kl_to_start")},
    ),
)
HEALTH = (
    Measure(
        "entropy",
        "Entropy",
        "Of the policy's next token. A fall towards zero means that it repeats itself and explores no more.",
        "update",
        "nats a token",
        {"entropy": _by_step("entropy")},
    ),
    Measure(
        "gradient-norm",
        "Gradient norm",
        "Before clipping.",
        "update",
        "gradient norm",
        {"norm": _by_step("grad_norm")},
    ),
    Measure(
        "effective-share",
        "Effective sample share",
        "1 when the engine samples exactly what the trainer scores; low when a few tokens carry the update.",
        "update",
        "share of tokens",
        {"share": _by_step("effective_sample_share")},
        span=(0.0, 1.05),
    ),
    Measure(
        "log-ratio",
        "Log-ratio of trainer to sampler",
        "The gap between the two sides' log-probabilities of a sampled token; 0 is exact.",
        "update",
        "nats a token",
        {"mean": _by_step("mean_log_ratio"), "largest": _by_step("max_log_ratio")},
    ),
    Measure(
        "capped-share",
        "Capped tokens",
        "Tokens whose importance weight reached its cap; on-policy sampling has hardly any.",
        "update",
        "share of tokens",
        {"share": _by_step("capped_share")},
        span=(0.0, None),
    ),
)
LIVE = Measure(
    "live-groups",
    "Groups to learn from",
    "Share of an update's groups that are live: only groups whose rewards differ teach something.",
    "update",
    "share of groups",
    {"live": _share("live_groups", "groups")},
    span=(0.0, 1.05),
)
LOST = Measure(
    "lost-in-updates",
    "In updates",
    "Share of an update's rollouts that were masked or failed.",
    "update",
    "share of rollouts",
    {"lost": _lost_share},
    span=(0.0, None),
)


# ---- series ------------------------------------------------------------------------------------


def _series(label: str, x: Sequence[float], y: Sequence[float | None]) -> Series:
    """The points that were measured."""
    known = [(float(at), float(value)) for at, value in zip(x, y, strict=True) if value is not None]
    return Series(label, tuple(at for at, _ in known), tuple(value for _, value in known))


def _measured(charts: Sequence[Chart]) -> list[Chart]:
    """The charts with at least one point."""
    return [chart for chart in charts if any(series.y for series in chart.series)]


def _in_words(series: Series) -> str:
    if not series.y:
        return f"{series.label}: nothing measured."
    highest = max(range(len(series.y)), key=series.y.__getitem__)
    return (
        f"{series.label}: from {series.y[0]:.3g} at {series.x[0]:,g} to {series.y[-1]:.3g} at {series.x[-1]:,g}, "
        f"highest {series.y[highest]:.3g} at {series.x[highest]:,g}."
    )
