"""What a person sees while a run is going on: a live view in a terminal, plain lines elsewhere."""

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text


class ProgressView:
    """Shows a run's events. Use as a context manager and hand it to the run as a listener.

    Args:
        title: Name of the run.
        console: Where to; a console without a terminal gets one plain line an event.
    """

    def __init__(self, title: str = "run", console: Console | None = None, lines: int = 6):
        self.console = console or Console()
        self.title = title
        self._plain = not self.console.is_terminal
        self._recent: deque[str] = deque(maxlen=lines)
        self._figures: dict[str, str] = {}
        self._phase = "starting"
        self._played = 0
        self._last_tick = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._updates = self._bar.add_task("weight updates", total=None)
        self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)

    def __enter__(self) -> "ProgressView":
        if not self._plain:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._plain:
            self._live.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take one event of the run."""
        show = getattr(self, f"_on_{event['event']}", None)
        if show is not None:
            show(event)

    # ---- one method an event -------------------------------------------------------------------

    def _on_phase(self, event: Mapping[str, Any]) -> None:
        self._phase, self._played = event["phase"], 0
        if self._plain and not event.get("quiet"):
            self._say(event["phase"])

    def _on_rollout(self, event: Mapping[str, Any]) -> None:
        self._played += 1
        if self._plain and time.monotonic() - self._last_tick > 30:  # a heartbeat, so that a wait is no hang
            self._last_tick = time.monotonic()
            self._say(f"{self._phase}: {self._played} rollouts")

    def _on_plan(self, event: Mapping[str, Any]) -> None:
        self._bar.update(self._updates, total=event["budget"]["updates"])

    def _on_candidate(self, event: Mapping[str, Any]) -> None:
        texts = " | ".join(event["texts"].values())
        self._figures["newest instruction"] = f"{event['score']:.2f}  {_short(texts)}"

    def _on_cycle(self, event: Mapping[str, Any]) -> None:
        report = event["report"]
        best = max((score for score in report["scores"] if score is not None), default=None)
        self._figures["population on anchors"] = ", ".join(_number(score) for score in report["scores"])
        self._say(
            f"cycle {report['cycle']}: best candidate {_number(best)} on the anchors, {report['rollouts']} rollouts "
            f"({report['reused']} reused), {report['reflections']} reflections, "
            f"{report['proposals_accepted']} accepted",
            keep=True,
        )

    def _on_step(self, event: Mapping[str, Any]) -> None:
        report, update = event["report"], event["report"]["update"]
        self._bar.update(self._updates, completed=report["step"] + 1)
        counts = report["counts"]
        self._figures |= {
            "reward": _number(report["reward"]),
            "KL to start / token": _number(update["kl_to_start"]),
            "entropy / token": _number(update["entropy"]),
            "groups flat": f"{counts.get('flat_groups', 0)} of {counts.get('groups', 0)}",
        }
        self._say(
            f"step {report['step']}: reward {_number(report['reward'])}, KL {_number(update['kl_to_start'])}, "
            f"entropy {_number(update['entropy'])}, {counts.get('flat_groups', 0)}/{counts.get('groups', 0)} groups "
            f"flat, {update['tokens']} tokens trained{_lost(counts)}"
        )

    def _on_note(self, event: Mapping[str, Any]) -> None:
        self._say(event["text"], keep=True)

    def _on_warning(self, event: Mapping[str, Any]) -> None:
        self._say(f"warning: {event['text']}", keep=True)

    # ---- drawing -------------------------------------------------------------------------------

    def _say(self, line: str, *, keep: bool = False) -> None:
        """One line: among the newest in the live view, or above it for good when it is worth keeping."""
        if self._plain or keep:
            self.console.print(f"[{self.title}] {line}", markup=False, highlight=False, soft_wrap=True)
        else:
            self._recent.append(line)

    def _render(self) -> Group:
        # Texts, not markup strings: an instruction may well hold square brackets.
        figures = Table.grid(padding=(0, 2))
        for name, value in self._figures.items():
            figures.add_row(Text(name, style="dim"), Text(value))
        rollouts = f", {self._played} rollouts" if self._played else ""
        head = Text.assemble((self.title, "bold"), f"  {self._phase}{rollouts}")
        return Group(head, self._bar, figures, *(Text(line, style="dim") for line in self._recent))


def _lost(counts: Mapping[str, int]) -> str:
    """What was masked or failed, by reason; nothing when nothing was."""
    lost = [f"{reason} x{count}" for reason, count in counts.items() if reason.startswith(("masked: ", "failed: "))]
    return f"; {', '.join(lost)}" if lost else ""


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"  # noqa: RUF001


def _short(text: str, width: int = 72) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"
