"""Makes runs in processes of their own, kills them, continues them, and compares them."""

import json
import multiprocessing
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.durability.child import attempt
from benchmarks.durability.moments import Clock, Death, Moment, draw_moments
from benchmarks.durability.outcome import outcome, outline, where
from benchmarks.durability.small_run import LABORATORY, Subject

PRELOADED = [
    *("dspy_fst.optimizer", "dspy_fst.engine.vllm.server", "programs.lab"),
    "transformers.models.qwen3.modeling_qwen3",
]
"""What the process that the children are forked from has imported, so that they start at once; it computes nothing."""
PATIENCE_S = 900
"""Seconds that one attempt may take, a server's start included."""


@dataclass(frozen=True)
class Trial:
    """One run that was killed and continued."""

    deaths: list[str]
    """When it was told to die; one that ended before its moment came says so."""
    resumed_from: list[str]
    acts_twice: int
    """Batches of rollouts and reflections that were begun again."""
    rollouts_twice: int
    reflections_twice: int
    unequal: list[str]
    """Parts of the outcome that differ from the undisturbed run's."""


@dataclass(frozen=True)
class Killed:
    """A run that was killed, continued and ended."""

    run_dir: Path
    deaths: list[str]
    """When it was told to die; one that ended before its moment came says so."""
    resumed_from: list[str]
    paid_twice: Counter[str]
    """Kind -> how many acts, rollouts and reflections were begun again."""


@dataclass
class Killer:
    """Makes runs, kills them and continues them, each attempt in a process of its own.

    Args:
        folder: Where the runs are made.
    """

    folder: Path
    engine: str = "in_process"
    settings: Mapping[str, Any] = field(default_factory=dict)
    subject: Subject = LABORATORY
    seconds: float = 0.0
    """Of the undisturbed run, for deaths by the clock."""

    def undisturbed(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The outcome of a run that nobody kills, and what its process told."""
        run_dir, notes = self._places(name)
        self._finish(run_dir, notes)
        told_by_child = json.loads((notes / "told").read_text())
        return outcome(run_dir), told_by_child

    def killed(self, name: str, *deaths: Death) -> Killed:
        """Kill a run at each moment in turn, and let it end."""
        run_dir, notes = self._places(name)
        happened, resumed_from = [], []
        for death in deaths:
            died = self._attempt(run_dir, notes, death) == -signal.SIGKILL
            happened.append(str(death) if died else f"(ended before {death})")
            resumed_from.append(where(run_dir))
        self._finish(run_dir, notes)
        return Killed(run_dir, happened, resumed_from, _begun_again(notes))

    def _places(self, name: str) -> tuple[Path, Path]:
        notes = self.folder / f"{name}-notes"
        notes.mkdir()
        return self.folder / name, notes

    def _finish(self, run_dir: Path, notes: Path) -> None:
        if (status := self._attempt(run_dir, notes, None)) != 0:
            output = (notes / "output").read_text()
            raise RuntimeError(f"the run in {run_dir} did not end well (exit status {status}):\n{output[-4000:]}")

    def _attempt(self, run_dir: Path, notes: Path, death: Death | None) -> int:
        """One process; returns its exit status, negative when a signal ended it."""
        (notes / "begun").unlink(missing_ok=True)
        moment = death if isinstance(death, Moment) else None
        arguments = (run_dir, notes, self.engine, self.settings, moment, self.subject)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        child = context.Process(target=attempt, args=arguments)
        child.start()
        if isinstance(death, Clock):
            _wait_for(notes / "begun")
            time.sleep(death.share * self.seconds)
            child.kill()
        child.join(PATIENCE_S)
        if child.exitcode is None:
            child.kill()
            raise TimeoutError(f"waited {PATIENCE_S} s for the run in {run_dir} to end or to die at {death}")
        return int(child.exitcode)


@dataclass
class Comparison(Killer):
    """Compares what was killed and continued with an undisturbed run, which it makes at first."""

    whole: dict[str, Any] = field(init=False)
    """The outcome of the undisturbed run."""
    counts: dict[str, int] = field(init=False)
    """How often it passed each place."""
    repeated: Counter[str] = field(init=False)
    """What it does twice by itself: texts that stay are validated at the start and at the end with the same draws."""

    def __post_init__(self) -> None:
        self.whole, noted = self.undisturbed("whole")
        self.repeated = _begun_again(self.folder / "whole-notes")
        self.counts, self.seconds = noted["counts"], noted["seconds"]

    def trial(self, name: str, *deaths: Death) -> Trial:
        """Kill a run at each moment in turn, let it end, compare, and remove it when it is equal."""
        killed = self.killed(name, *deaths)
        twice = killed.paid_twice - self.repeated
        unequal = self.differing(outcome(killed.run_dir))
        if not unequal:
            shutil.rmtree(killed.run_dir)
        return Trial(killed.deaths, killed.resumed_from, twice["act"], twice["rollout"], twice["reflection"], unequal)

    def differing(self, found: dict[str, Any]) -> list[str]:
        """The parts of an outcome that are not the undisturbed run's."""
        shown = (lambda left: left) if self.engine == "in_process" else outline
        whole, found = shown(self.whole), shown(found)
        return [part for part in whole if whole[part] != found[part]]


def _begun_again(notes: Path) -> Counter[str]:
    """Kind -> how many acts, rollouts and reflections were begun again."""
    return Counter(line.split()[0] for line in _repeated((notes / "paid").read_text().splitlines()))


def _repeated(lines: Sequence[str]) -> list[str]:
    """Every line beyond the first of its kind."""
    return [line for line, times in Counter(lines).items() for _ in range(times - 1)]


def _wait_for(path: Path, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for the child process to begin ({path})")
        time.sleep(0.01)


def plan_deaths(killer: Comparison, kills: int, rng: random.Random) -> list[tuple[Death, ...]]:
    """A list of deaths for each trial: every fifth by the clock, every third dies a second time."""
    moments = iter(draw_moments(killer.counts, 2 * kills, rng))
    planned: list[tuple[Death, ...]] = []
    for index in range(kills):
        first: Death = Clock(rng.uniform(0.02, 0.98)) if index % 5 == 4 else next(moments)
        if index % 3 == 2:
            again = next(moments)
            # What goes on passes less of everything; an early passage is more likely to come.
            planned.append((first, Moment(again.place, (again.passage + 2) // 3, again.edge)))
        else:
            planned.append((first,))
    return planned
