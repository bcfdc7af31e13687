"""The view of a run that goes on: live in a terminal or a notebook, plain lines elsewhere."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dspy_fst.formatting.numbers import counted, duration, number
from dspy_fst.outcomes.outcome import OutcomeCounts
from dspy_fst.report.metric_names import entry_of
from dspy_fst.report.samples import sample_line
from dspy_fst.report.standing import Standing, Times
from dspy_fst.report.step_options import step_words
from dspy_fst.report.verdict import validation_line
from dspy_fst.run.directory import Event
from dspy_fst.run.ending import StopReason
from dspy_fst.run.learning import NOTHING_CHANGED
from dspy_fst.run.validated import Validated

logger = logging.getLogger(__name__)
HEARTBEAT_S = 30.0
"""A plain log reports new rollouts at least this often, so that waiting does not look like a hang."""
NOTEBOOK_S = 0.5
"""Shortest time between two updates of a notebook's view: each is a message to the browser."""
BARS = "▁▂▃▄▅▆▇█"
SHOWN_REWARDS, SHOWN_CANDIDATES = 24, 3


class ProgressView:
    """Shows a run's events. Use as a context manager and hand it to the run as a listener.

    Args:
        title: Name of the run.
        console: Where to show it. A console without a terminal gets one plain line for each event.
        lines: How many of the newest lines a live view shows.
        clock: Gives seconds, for the times of the phases and the time left.
        samples: Whether to show one sampled reply for each step.
    """

    def __init__(
        self,
        title: str = "run",
        console: Console | None = None,
        lines: int = 6,
        clock: Callable[[], float] = time.monotonic,
        *,
        samples: bool = False,
    ):
        self.console = console or Console()
        self.title = title
        self._clock = clock
        self._notebook = _Notebook() if self.console.is_jupyter else None
        terminal = self.console.is_terminal and not self.console.is_dumb_terminal
        self._plain = not (terminal or self._notebook)
        # A notebook keeps its notes and warnings in the view, so it has room for more.
        self._recent: deque[str] = deque(maxlen=2 * lines if self._notebook else lines)
        self._standing = Standing()
        self._times = Times(clock)
        self._figures: dict[str, float] = {}
        self._rewards: deque[float | None] = deque(maxlen=SHOWN_REWARDS)
        self._candidates: list[tuple[float | None, str]] = []
        self._validated: list[Validated] = []
        self._searching = False
        self._samples, self._sample = samples, ""
        self._phase = "starting"
        self._heard = clock()
        self._open = ExitStack()
        self._live = None
        if terminal and not self._notebook:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)

    def __enter__(self) -> "ProgressView":
        self._open.enter_context(without_loading_bars())
        if self._live:
            self._open.enter_context(self._live)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._refresh(now=True)
        finally:
            self._open.close()

    def recall(self, events: Sequence[Event]) -> None:
        """Take in earlier events without printing them, so that a continued run shows its whole progress."""
        for event in events:
            if event["event"] == "plan":
                self._standing.budget = event["budget"]
            elif event["event"] == "validation":
                self._take_validation(event)
            elif event["event"] in ("cycle", "step"):
                self._measured(event)
        self._standing.played = self._standing.played_masked = 0

    def __call__(self, event: Event) -> None:
        """Take one event of the run."""
        show = getattr(self, f"_on_{event['event']}", None)
        if show is not None:
            show(event)
            self._refresh(now=event["event"] in ("cycle", "step", "validation", "warning", "done", "ended"))

    # ---- one method an event -------------------------------------------------------------------

    def _on_phase(self, event: Event) -> None:
        self._phase = event["phase"]
        self._times.enter(self._phase.rpartition(": ")[2])
        if self._plain and not event.get("quiet"):
            self._say(self._phase)

    def _on_rollout(self, event: Event) -> None:
        self._standing.played += 1
        self._standing.played_masked += event["reward"] is None
        if self._plain and self._clock() - self._heard > HEARTBEAT_S:
            self._say(f"{self._phase}: {counted(self._standing.played, 'rollout')}")

    def _on_plan(self, event: Event) -> None:
        self._standing.budget = event["budget"]

    def _on_candidate(self, event: Event) -> None:
        if not self._searching:  # candidates of an earlier search were scored on other problems
            self._searching, self._candidates = True, []
        candidates = [*self._candidates, (event["score"], _words(event["texts"]))]
        self._candidates = sorted(candidates, key=lambda candidate: -candidate[0])[:SHOWN_CANDIDATES]

    def _on_cycle(self, event: Event) -> None:
        report = event["report"]
        self._times.measured("search", self._standing.played)
        self._measured(event)
        best = entry_of(event).values.get("search/best_score")  # type: ignore[union-attr]
        self._say(
            f"cycle {report['cycle']}: best candidate {number(best)} on the anchors, "
            f"{counted(report['rollouts'], 'rollout')} and {counted(report['repeats'], 'repeat')}, "
            f"{counted(report['reflections'], 'reflection')}, {report['proposals_accepted']} accepted",
            keep=True,
        )

    def _on_step(self, event: Event) -> None:
        report = event["report"]
        self._times.measured("train", self._standing.played)
        self._measured(event)
        figures, counts = self._figures, report["counts"]
        distances = {"KL": figures.get("train/kl_to_start"), "under the seed": report["update"].get("kl_under_seed")}
        measured = "".join(f"{name} {_small(kl)}, " for name, kl in distances.items() if kl is not None)
        self._say(
            f"step {report['step']}: reward {number(figures.get('train/reward'))}, "
            f"{measured}entropy {number(figures.get('train/entropy'))}, "
            f"{counts.get('flat_groups', 0)}/{counts.get('groups', 0)} groups flat{step_words(report)}, "
            f"{counted(report['update']['tokens'], 'token')} trained{_lost(counts)}"
        )

    def _on_validation(self, event: Event) -> None:
        self._times.measured("validation", event["report"]["counts"]["rollouts"])
        self._take_validation(event)
        self._say(validation_line(self._validated), keep=True)

    def _take_validation(self, event: Event) -> None:
        self._standing.done["validation"] += event["report"]["counts"]["rollouts"]
        self._validated.append(Validated.from_event(event))

    def _on_ended(self, event: Event) -> None:
        """Advice against a standstill is not repeated here: it comes as a warning or with the error."""
        reason = StopReason(**event["reason"])
        if reason.early:
            words = _sentences(reason) if reason.kind == "early_stopping" else reason.text
            self._say(f"ended after step {reason.step}: {words}", keep=True)

    def _on_trajectories(self, event: Event) -> None:
        """One sampled reply of the step, if samples are to be shown."""
        rollouts = event["rollouts"]
        if self._samples and rollouts:
            self._sample = sample_line(rollouts[event["step"] % len(rollouts)])
            if self._plain or self._notebook:
                self._say(f"sample: {self._sample}")

    def _on_done(self, event: Event) -> None:
        self._phase = "finished"
        if "ending" in event:
            self._say(f"finished: {event['ending']}", keep=True)

    def _on_note(self, event: Event) -> None:
        self._say(event["text"], keep=True)

    def _on_warning(self, event: Event) -> None:
        self._say(f"warning: {event['text']}", keep=True)

    def _measured(self, event: Event) -> None:
        """Take in the report of a search or a step."""
        self._standing.add(event)
        if event["event"] == "cycle":
            self._searching = False
            self._candidates = _population(event)[:SHOWN_CANDIDATES] or self._candidates
            return
        self._figures = dict(entry_of(event).values)  # type: ignore[union-attr]
        self._rewards.append(event["report"]["reward"])

    # ---- drawing -------------------------------------------------------------------------------

    def _say(self, line: str, *, keep: bool = False) -> None:
        """Show one line: among the newest lines of the live view, or above it for good with ``keep``."""
        self._heard = self._clock()
        if self._plain or (keep and self._live):
            line = _printable(line, self.console.encoding, kept="\n").replace("\n", "\n  ")  # a table, code to copy
            self.console.print(f"[{self.title}] {line}", markup=False, highlight=False, soft_wrap=True)
        else:
            self._recent.append(_printable(line, self.console.encoding))

    def _refresh(self, *, now: bool) -> None:
        """Send the view to a notebook. In a terminal rich redraws it by itself."""
        if self._notebook:
            self._notebook.show(self._render(), now=now)

    def _render(self) -> Table:
        # Runs in a thread of rich, so what events change is copied first. Text, not markup: instructions hold brackets.
        grid = Table.grid(expand=True)
        left = self._times.left(self._standing)
        head = Text.assemble((_printable(self.title, self.console.encoding), "bold"), f"  {self._phase}")
        grid.add_row(_line(head.append(f"  about {duration(left)} left", "dim") if left else head))
        if planned := self._standing.planned:
            grid.add_row(ProgressBar(total=planned, completed=min(self._standing.spent, planned)))
        figures = Table.grid(padding=(0, 2))
        figures.add_column(no_wrap=True, style="dim")
        figures.add_column(ratio=1)
        for name, value in self._rows():
            text = Text(_printable(value, self.console.encoding))
            figures.add_row(name, text if name == "time" else _line(text))
        grid.add_row(figures)
        for line in tuple(self._recent):
            grid.add_row(_line(Text(line, style="dim")))
        return grid

    def _rows(self) -> Iterator[tuple[str, str]]:
        standing, figures = self._standing, self._figures
        if standing.progress:
            yield "progress", standing.progress
        yield "rollouts", standing.rollouts
        if rewards := tuple(self._rewards):
            yield "reward", f"{number(rewards[-1])}  {sparkline(rewards)}"
            if (distance := figures.get("train/kl_to_start")) is not None:
                yield "KL to start", f"{_small(distance)} nats a token"
            yield "entropy", f"{number(figures.get('train/entropy'))} nats a token"
            yield "groups flat", f"{figures.get('train/flat_groups', 0):g} of {figures.get('train/groups', 0):g}"
        if validated := tuple(self._validated):
            yield "validation", validation_line(validated).removeprefix("validation ")
        for place, (score, text) in enumerate(tuple(self._candidates)):
            yield "" if place else "best texts", f"{number(score)}  {text}"
        if self._sample:
            yield "sample", self._sample
        yield "time", self._times.words


class _Display(Protocol):
    """IPython's handle of an output that can be replaced."""

    def update(self, view: RenderableType, /) -> None: ...


class _Notebook:
    """One output of a notebook cell that is replaced in place. rich would need ipywidgets for that."""

    def __init__(self) -> None:
        self._handle: _Display | None = None
        self._shown = 0.0

    def show(self, view: RenderableType, *, now: bool) -> None:
        from IPython.display import display

        if not now and time.monotonic() - self._shown < NOTEBOOK_S:
            return
        self._shown = time.monotonic()
        if self._handle is None:
            self._handle = display(view, display_id=True)
        else:
            self._handle.update(view)


def log_ending(reason: StopReason, ending: str) -> None:
    """In place of a view: log a warning when the run ended early or changed no weights.

    Args:
        reason: Why it ended.
        ending: What its updates did to the weights.
    """
    if reason.early:
        steps = counted(reason.step, "step")
        logger.warning("the run is finished early, after %s: %s", steps, _sentences(reason))
    if ending.startswith(NOTHING_CHANGED):
        logger.warning("the run is finished, and %s", ending)


def _sentences(reason: StopReason) -> str:
    """What was seen, then the advice if there is any."""
    return ". ".join(filter(None, (reason.text, reason.advice)))


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """A block in which transformers draws no progress bars. They would break the view."""
    from transformers.utils import logging as bars

    if not bars.is_progress_bar_enabled():
        yield
        return
    bars.disable_progress_bar()
    try:
        yield
    finally:
        bars.enable_progress_bar()


def sparkline(values: Sequence[float | None]) -> str:
    """One bar for each value, scaled from the lowest to the highest; a blank where nothing was measured.

    >>> sparkline([0.0, None, 0.5, 1.0])
    '▁ ▄█'
    """
    known = [value for value in values if value is not None]
    low, span = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)

    def bar(value: float) -> str:
        return BARS[int((value - low) / span * (len(BARS) - 1))] if span else BARS[0]

    return "".join(" " if value is None else bar(value) for value in values)


def _population(event: Event) -> list[tuple[float | None, str]]:
    """Score and texts of each candidate in the search's population, best first, without copies."""
    texts = {candidate["digest"]: _words(candidate["texts"]) for candidate in event.get("candidates", ())}
    report = event["report"]
    members = dict(zip(report.get("population", ()), report["scores"], strict=False))
    return [(score, texts[digest]) for digest, score in members.items() if digest in texts]


def _lost(counts: Mapping[str, int]) -> str:
    """Masked and failed rollouts by reason, with a separator before them; empty when there are none."""
    words = OutcomeCounts.of(counts).words
    return f"; {words}" if words else ""


def _small(value: float) -> str:
    """Three significant digits: early KLs are tiny, but not 0."""
    return f"{value:.3g}"


def _words(texts: Mapping[str, str]) -> str:
    return " | ".join(" ".join(text.split()) for text in texts.values())


def _line(text: Text) -> Text:
    """The text as one line, cut at the edge of the view: a view whose height jumps cannot be read."""
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _printable(text: str, encoding: str, kept: str = "") -> str:
    """The text without control characters other than ``kept``, and without what the terminal cannot encode."""
    seen = "".join(character if character.isprintable() or character in kept else " " for character in text)
    return seen.encode(encoding, "replace").decode(encoding)
