"""A run's events as frozen records: what charts and pages are made of, and the only reader of events among them.

Any beginning of a run's events gives a record: of a run that has just started, goes on, or was killed. Numbers that
were not measured are None.
"""

import fcntl
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from dspy_fst.errors import RunDirectoryError
from dspy_fst.report.evaluated import (
    SEEN,
    Conditions,
    Evaluated,
    TwoByTwo,
    as_written,
    evaluated_of,
    evaluations_in,
    two_by_two_of,
)
from dspy_fst.report.samples import Played, played
from dspy_fst.run.directory import LOCK, read_events
from dspy_fst.run.ending import StopReason, ended_of
from dspy_fst.run.learning import Ending, ending
from dspy_fst.run.validated import Validated, validated_in
from dspy_fst.types import Candidate, CycleReport, PredictorReport, StepReport, UpdateReport

State = Literal["finished", "running", "stopped"]
Events = Sequence[Mapping[str, Any]]
T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """A candidate in the lineage of a run."""

    number: int
    """Place in the order of birth, from 0."""
    digest: str
    texts: Mapping[str, str]
    parents: tuple[str, ...] = ()
    """Digests of what it was made from, all older than itself."""
    born: int | None = None
    """The cycle whose search made it; None when the run started with it."""
    scores: Mapping[int, float | None] = field(default_factory=dict)
    """Cycle -> mean anchor score under that cycle's weights."""
    populations: tuple[int, ...] = ()
    """Cycles whose search chose it into the population."""
    final: int = 0
    """Its copies in the final population."""
    validation: float | None = None

    @property
    def birth_score(self) -> float | None:
        """Its first anchor score."""
        return next(iter(self.scores.values()), None)

    @property
    def last_score(self) -> float | None:
        """Its newest anchor score."""
        return next(reversed([*self.scores.values()]), None)


@dataclass(frozen=True)
class Told:
    """A warning, and the step after which it was given; None when it came before the first."""

    step: int | None
    text: str


@dataclass(frozen=True)
class Spent:
    """What a run had spent when a step was over: searches, scoring and training together."""

    rollouts: int
    tokens: int
    """Sampled tokens."""


@dataclass(frozen=True)
class Costs:
    """What a run spent in all, as far as its events go; validation stands apart."""

    search_rollouts: int
    """Scoring the carried population included."""
    reused: int
    """Evaluations of the searches that were answered from rollouts already made."""
    training_rollouts: int
    reflections: int
    reflections_failed: int
    accepted: int
    search_tokens: int
    training_tokens: int
    """Sampled for the weight updates."""
    trained_tokens: int
    """Of those, the tokens that the updates learnt from."""
    validation_rollouts: int
    """Outside of the budget, as are its tokens; neither is in ``rollouts`` and ``tokens``."""
    validation_tokens: int
    updates: int
    """Updates that moved the weights."""
    skipped: int
    seconds: Mapping[str, float]
    """Wall time by activity; together it is the time from the first event to the last."""

    @property
    def rollouts(self) -> int:
        return self.search_rollouts + self.training_rollouts

    @property
    def tokens(self) -> int:
        return self.search_tokens + self.training_tokens


@dataclass(frozen=True)
class Earned:
    """What one predictor did and earned in all updates of a run, and what came of changing its text.

    The updates' figures are None when no update tells of it.
    """

    predictor: str
    calls: int | None
    tokens: int | None
    """Sampled in its calls."""
    truncated: int | None
    """Calls that were cut off."""
    unparsed: int | None
    """Rollouts that ended in a reply of its that does not parse."""
    rows: int | None
    """Calls that were learnt from."""
    positive_rows: int | None
    """Of those, the ones with an advantage above 0."""
    flat_groups: int | None
    """Groups in which its calls taught nothing."""
    advantage: float | None
    """Mean over its rows."""
    scores: tuple[float, ...]
    """Mean score of its own in each update that has one."""
    changed: int
    """Candidates whose text for it is not their parent's."""
    changed_alone: int
    """Of those, the ones whose other texts are their parent's."""
    gain: float | None
    """Mean of these candidates' anchor scores less their parents', under the same weights."""


@dataclass(frozen=True)
class Record:
    """All that the events of one run tell."""

    name: str
    state: State
    started: float | None = None
    """Seconds since 1970, of the first event."""
    last: float | None = None
    """The same, of the last event."""
    config: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[Told, ...] = ()
    cycles: tuple[CycleReport, ...] = ()
    steps: tuple[StepReport, ...] = ()
    spent: tuple[Spent, ...] = ()
    """After each of ``steps``."""
    nodes: tuple[Node, ...] = ()
    """Every candidate, in the order of birth."""
    population: tuple[str, ...] = ()
    """Digests of the final population, or of the newest while there is no final one; best first."""
    trajectories: Mapping[int, tuple[Played, ...]] = field(default_factory=dict)
    """Step -> its samples: the best and the worst rollout of its most telling group, then others."""
    weights: str | None = None
    validations: tuple[Validated, ...] = ()
    """States that were measured on the valset, in order; empty for runs of older releases."""
    returned: Validated | None = None
    """The one of them that compile() returned; None while the run is not finished."""
    ended: StopReason | None = None
    """Why the run's alternation is over; None while it goes on, after a kill, and for a run of an older release."""
    two_by_two: TwoByTwo | None = None
    evaluations: tuple[Evaluated, ...] = ()

    @cached_property
    def by_digest(self) -> Mapping[str, Node]:
        return {node.digest: node for node in self.nodes}

    @cached_property
    def ending(self) -> Ending:
        """What the updates came to so far."""
        failures = [self.config.get(name) or 0.0 for name in ("failure_score", "format_failure_score")]
        best_score = self.config.get("perfect_score")
        return ending(self.steps, min(failures), 1.0 if best_score is None else best_score)

    @property
    def start_validated(self) -> Validated | None:
        """The validation of the start, on the newest one's terms; None where there is none."""
        terms = self.validations[-1].terms if self.validations else None
        return next((state for state in self.validations if state.when == "start" and state.terms == terms), None)

    @property
    def seen(self) -> list[str]:
        """A sentence for each evaluated split whose problems the run has seen."""
        made: list[Conditions] = [*self.evaluations, *([self.two_by_two] if self.two_by_two else [])]
        splits = {of.split for of in made}
        return [f"{split}: {why}" for split, why in SEEN.items() if split in splits]

    @property
    def rewards(self) -> list[float]:
        """Mean training rewards of the steps that measured one."""
        return [step.reward for step in self.steps if step.reward is not None]

    @property
    def found(self) -> list[float | None]:
        """The best score in each search's population."""
        return [best(cycle.scores) for cycle in self.cycles]

    @property
    def carried(self) -> list[float | None]:
        """The best score among what each search started from, on the same anchors under the same weights."""
        started: list[tuple[str, ...]] = [tuple(node.digest for node in self.nodes if node.born is None)]
        started += [cycle.population for cycle in self.cycles]
        return [
            best([self.by_digest[digest].scores.get(cycle.cycle) for digest in population])
            for cycle, population in zip(self.cycles, started, strict=False)
        ]

    @property
    def lost(self) -> Counter[str]:
        """Rollouts that were masked or failed, by reason, the most frequent first."""
        reports: list[CycleReport | StepReport] = [*self.cycles, *self.steps]
        counts = sum((lost_of(report.counts) for report in reports), Counter[str]())
        return Counter(dict(counts.most_common()))

    @cached_property
    def predictors(self) -> tuple[Earned, ...]:
        """Every predictor that was called or has a text, in the order of the program's texts."""
        named = [name for node in self.nodes for name in node.texts]
        called = [name for step in self.steps for name in step.predictors]
        return tuple(map(self._earned, dict.fromkeys(named + called)))

    def _earned(self, name: str) -> Earned:
        reports = [step.predictors[name] for step in self.steps if name in step.predictors]
        rows = sum(report.rows or 0 for report in reports)
        changes = [names for node in self.nodes if name in (names := self._changed(node))]
        gains = [
            gain for node in self.nodes if self._changed(node) == [name] and (gain := self._gain(node)) is not None
        ]
        counted = ("calls", "tokens", "truncated", "unparsed", "rows", "positive_rows", "flat_groups")
        return Earned(
            predictor=name,
            **{count: sum(getattr(r, count) or 0 for r in reports) if reports else None for count in counted},
            advantage=sum((r.advantage or 0.0) * (r.rows or 0) for r in reports) / rows if rows else None,
            scores=tuple(report.score for report in reports if report.score is not None),
            changed=len(changes),
            changed_alone=changes.count([name]),
            gain=math.fsum(gains) / len(gains) if gains else None,
        )

    def _parent(self, node: Node) -> Node | None:
        """The one candidate that it was made from."""
        return self.by_digest.get(node.parents[0]) if len(node.parents) == 1 else None

    def _changed(self, node: Node) -> list[str]:
        """Names whose text is not the parent's."""
        parent = self._parent(node)
        return [] if parent is None else [name for name in node.texts if node.texts[name] != parent.texts.get(name)]

    def _gain(self, node: Node) -> float | None:
        """Its anchor score less its parent's, in the search that made it."""
        parent = self._parent(node)
        if parent is None or node.born is None:
            return None
        score, before = node.scores.get(node.born), parent.scores.get(node.born)
        return None if score is None or before is None else score - before

    @cached_property
    def costs(self) -> Costs:
        cycles, steps = self.cycles, self.steps
        trained = [step.update for step in steps if step.update.tokens]
        return Costs(
            search_rollouts=sum(cycle.rollouts for cycle in cycles),
            reused=sum(cycle.reused for cycle in cycles),
            training_rollouts=sum(
                step.counts.get("rollouts", 0) + step.counts.get("held_rollouts", 0) for step in steps
            ),
            reflections=sum(cycle.reflections for cycle in cycles),
            reflections_failed=sum(cycle.counts.get("reflections_failed", 0) for cycle in cycles),
            accepted=sum(cycle.proposals_accepted for cycle in cycles),
            search_tokens=sum(cycle.sampled_tokens for cycle in cycles),
            training_tokens=sum(step.sampled_tokens for step in steps),
            trained_tokens=sum(update.tokens for update in trained),
            validation_rollouts=sum(state.counts.get("rollouts", 0) for state in self.validations),
            validation_tokens=sum(state.sampled_tokens for state in self.validations),
            updates=len(trained),
            skipped=sum(step.update.skipped is not None for step in steps),
            seconds=self._seconds(),
        )

    def _seconds(self) -> dict[str, float]:
        spent = Counter({"sampling for searches": sum(cycle.seconds or 0.0 for cycle in self.cycles)})
        names = {"sampling": "sampling for updates", "update": "weight updates", "publish": "publishing weights"}
        for step in self.steps:
            for activity, seconds in step.seconds.items():
                spent[names.get(activity, activity)] += seconds or 0.0  # type: ignore[assignment]
        if self.validations:
            spent["validation"] = math.fsum(state.seconds for state in self.validations)  # type: ignore[assignment]
        whole = (self.last or 0.0) - (self.started or 0.0)
        rest = max(0.0, whole - math.fsum(spent.values()))
        return {**spent, "everything else (reflections, saving, pauses)": rest}


def best(scores: Sequence[float | None]) -> float | None:
    """The highest measured score; None when nothing was measured."""
    return max((score for score in scores if score is not None), default=None)


def lost_of(counts: Mapping[str, int]) -> Counter[str]:
    """What was masked or failed, by reason."""
    return Counter({name: count for name, count in counts.items() if name.startswith(("masked: ", "failed: "))})


# ---- from a run's directory --------------------------------------------------------------------


def read_records(run_dirs: Sequence[Path]) -> list[Record]:
    """The records of these runs, under names that tell them apart.

    Raises:
        RunDirectoryError: one is not the directory of a run.
    """
    if not run_dirs:
        raise ValueError("run_dirs is empty; name the directory of one run at least")
    return [read_record(path, name) for path, name in zip(run_dirs, _names(run_dirs), strict=True)]


def read_record(path: Path, name: str, events: Events | None = None) -> Record:
    """The record of one run; ``events`` are the run's for who has read them already. Raises: see `read_records`."""
    if not any((path / file).is_file() for file in ("events.jsonl", "recipe.json")):
        raise RunDirectoryError(f"{path} is not the directory of a run: it holds neither events.jsonl nor recipe.json")
    evaluations = path / "evaluations.jsonl"
    lines = evaluations.read_text("utf-8", "replace").splitlines() if evaluations.is_file() else []
    events = read_events(path) if events is None else events
    return record_of(events, name=name, evaluations=lines, in_use=_in_use(path))


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ; a path that is named twice gets its place."""
    whole = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-length:]) for parts in whole]
        if len(set(names)) == len(set(whole)):
            break
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, start=1)]


def _in_use(path: Path) -> bool:
    """Whether a run holds the directory now. A shared lock is asked for and let go at once; a run's is exclusive."""
    try:
        with (path / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, or a file system without locks
        return False
    return False


# ---- from events -------------------------------------------------------------------------------


def record_of(events: Events, *, name: str = "run", evaluations: Sequence[str] = (), in_use: bool = False) -> Record:
    """The record of a run whose events are known so far.

    Args:
        evaluations: Lines of ``evaluations.jsonl``.
        in_use: Whether a process works on the run now.
    """
    plan: Mapping[str, Any] = next(reversed(_of(events, "plan")), {})
    done: Mapping[str, Any] = next(reversed(_of(events, "done")), {})
    times = [event["time"] for event in events if event.get("time") is not None]
    cycles = tuple(_cycle(event["report"]) for event in _of(events, "cycle"))
    evaluated = list(evaluations_in(evaluations))
    nodes, validations = _lineage(events, done), validated_in(events)
    final = [node.digest for texts in _members(done) if (node := _with_texts(nodes.values(), texts))]
    return Record(
        name=name,
        state="finished" if done else "running" if in_use else "stopped",
        started=min(times, default=None),
        last=max(times, default=None),
        config=plan.get("config") or {},
        budget=plan.get("budget") or {},
        warnings=tuple(_warnings(events)),
        cycles=cycles,
        steps=tuple(_step(event["report"]) for event in _of(events, "step")),
        spent=tuple(_spent(events)),
        nodes=tuple(nodes.values()),
        population=tuple(final) if done else cycles[-1].population if cycles else (),
        trajectories={event["step"]: tuple(map(played, event["rollouts"])) for event in _of(events, "trajectories")},
        weights=done.get("weights"),
        validations=tuple(validations),
        returned=next((state for state in validations if state.index == done.get("returned")), None),
        ended=ended_of(events),
        two_by_two=next((table for data in reversed(evaluated) if (table := two_by_two_of(data))), None),
        evaluations=tuple(made for data in evaluated if (made := evaluated_of(data))),
    )


def _of(events: Events, kind: str) -> list[Mapping[str, Any]]:
    return [event for event in events if event.get("event") == kind]


def _cycle(data: Mapping[str, Any]) -> CycleReport:
    return as_written(CycleReport, data, scores=tuple(data["scores"]), population=tuple(data["population"]))


def _step(data: Mapping[str, Any]) -> StepReport:
    predictors = {name: as_written(PredictorReport, of) for name, of in (data.get("predictors") or {}).items()}
    return as_written(StepReport, data, update=as_written(UpdateReport, data["update"]), predictors=predictors)


def _warnings(events: Events) -> Iterator[Told]:
    """Warnings of the run's watch, and notes that call themselves one."""
    for event in events:
        text = event.get("text", "")
        if event.get("event") == "warning" or (event.get("event") == "note" and text.startswith("warning: ")):
            yield Told(event.get("step"), text.removeprefix("warning: "))


def _spent(events: Events) -> Iterator[Spent]:
    rollouts = tokens = 0
    for event in events:
        kind, report = event.get("event"), event.get("report", {})
        if kind in ("cycle", "step"):
            rollouts += report["rollouts"] if kind == "cycle" else report["counts"].get("rollouts", 0)
            tokens += report["sampled_tokens"]
        if kind == "step":
            yield Spent(rollouts, tokens)


def _lineage(events: Events, done: Mapping[str, Any]) -> dict[str, Node]:
    """Every candidate by digest, in the order of birth.

    A search that proposes a text again names other parents for it, which may be its own children: only what is older
    than a candidate counts as its parent.
    """
    drafts: dict[str, dict[str, Any]] = {}
    for event in _of(events, "cycle"):
        cycle = event["report"]["cycle"]
        for candidate in event["candidates"]:
            digest = candidate["digest"]
            if digest not in drafts:
                parents = tuple(parent for parent in event["parents"].get(digest, ()) if parent in drafts)
                born = cycle if parents else None
                drafts[digest] = {"texts": candidate["texts"], "parents": parents, "born": born, "scores": {}}
            drafts[digest]["scores"].setdefault(cycle, candidate["score"])
    nodes = {digest: Node(number, digest, **draft) for number, (digest, draft) in enumerate(drafts.items())}
    for texts in _members(done):
        if _with_texts(nodes.values(), texts) is None:  # a run without searches ends with what it started with
            digest = Candidate(texts).digest
            nodes[digest] = Node(len(nodes), digest, texts)
    reports = [event["report"] for event in _of(events, "cycle")]
    return {
        digest: replace(
            node,
            populations=tuple(report["cycle"] for report in reports if digest in report["population"]),
            final=sum(texts == node.texts for texts in _members(done)),
            validation=(done.get("validation") or {}).get(digest),
        )
        for digest, node in nodes.items()
    }


def _members(done: Mapping[str, Any]) -> list[dict[str, str]]:
    return done["population"]["members"] if done else []


def _with_texts(nodes: Iterable[Node], texts: Mapping[str, str]) -> Node | None:
    """The candidate of these texts. Not by digest: secrets are taken out of what is written, so it would differ."""
    return next((node for node in nodes if node.texts == texts), None)
