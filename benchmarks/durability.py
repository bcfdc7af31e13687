"""What a killed run loses: the act in hand, and nothing else.

    python -m benchmarks.durability --kills 20 --seed 0
    python -m benchmarks.durability --engine vllm --kills 4

A small run is made once undisturbed. Then, for every seeded moment, it is made again in a process that dies there by
SIGKILL (some die a second time while they go on), continued by the same call, and compared with the undisturbed one:
events, populations, weights, the state to go on from and the names of all files. On the in-process engine every bit
must be equal; on vLLM, whose batches are cut by a clock, everything but what was sampled.

A process dies from inside, at the n-th passage of a place (a file written, renamed or removed, a rollout, a reflection,
an update, a load), or from outside by the clock. Linux only: a file is recognised by its descriptor in /proc.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import dspy
from rich.console import Console
from rich.table import Table

from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.engine.in_process import InProcessEngine
from dspy_fst.engine.vllm.server import VLLMServer
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.run.directory import read_events
from dspy_fst.run.files import read_json, sha256_of, write_json
from dspy_fst.slow.trainer import Trainer
from programs.lab import BASE, FeedbackProposer, build
from programs.lab.tokenizer import signature

RESULT = Path(__file__).parent / "results" / "durability.json"
SMALL: dict[str, Any] = {
    "cycles": 2,
    "steps_per_cycle": 3,
    "problems_per_step": 2,
    "population_size": 2,
    "group_size": 4,
    "anchors": 4,
    "search_rollouts": 12,
    "learning_rate": 5e-4,
    "warmup_steps": 2,
    "num_threads": 8,
    "progress": False,
}
ENGINE_OPTIONS: dict[str, dict[str, Any]] = {
    "in_process": {"linger_s": 60.0},  # on a busy machine the default would cut batches, and so change the rounding
    "vllm": {"cpu_kv_cache_gib": 1},
}
PRELOADED = [
    *("dspy_fst.optimizer", "dspy_fst.engine.vllm.server", "programs.lab"),
    "transformers.models.qwen3.modeling_qwen3",
]
"""What the process that the children are forked from has imported, so that they start at once; it computes nothing."""
PATIENCE_S = 900
"""Seconds that one attempt may take, a server's start included."""


# ---- the run --------------------------------------------------------------------------------------


class Relay(dspy.Module):
    """Two trained modules, one speaking after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict(signature("Reverse the list."))
        self.last = dspy.Predict(signature("Drop the last number."))

    def forward(self, numbers: str) -> dspy.Prediction:
        return self.last(numbers=self.first(numbers=numbers).answer)


LAB = build(train=12, val=2, test=1)


def places_right(
    gold: Any, pred: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None
) -> dspy.Prediction:
    """Share of the numbers that stand where they should: something that a group differs in."""
    wanted, got = gold.answer.split(), str(pred.answer).split()
    right = sum(one == other for one, other in zip(wanted, got, strict=False))
    return dspy.Prediction(score=right / max(len(wanted), len(got)), feedback=LAB.metric(gold, pred).feedback)


def compile_small(
    run_dir: Path,
    *,
    engine: str = "in_process",
    propose: Callable[..., dict[str, str]] | None = None,
    **settings: Any,
) -> dspy.Module:
    """The run that is killed: two modules on the laboratory's base model, a proposer that needs no LM."""
    program = Relay()
    options = ENGINE_OPTIONS[engine]
    program.set_lm(PolicyLM(BASE, engine=engine, max_tokens=12, engine_options=options))  # type: ignore[arg-type]
    optimizer = FSTOptimizer(
        metric=places_right, propose=propose or FeedbackProposer(), run_dir=run_dir, **{**SMALL, **settings}
    )
    return optimizer.compile(program, trainset=LAB.trainset, valset=LAB.valset)


@dataclass(frozen=True)
class Subject:
    """What is run, killed and continued."""

    make: Callable[..., Any]
    """Called with the run directory, ``engine``, ``propose`` and the settings; a child process must find it by name."""
    proposer: Callable[..., dict[str, str]]
    """Its proposals depend on its arguments alone."""


LABORATORY = Subject(compile_small, FeedbackProposer())


# ---- moments --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """The n-th passage of a place, before it, after it, or with half of it done (a file of which half was written)."""

    place: str
    """``"write journal"``, ``"rename state"``, ``"search rollout"``, ``"reflection"``, ..."""
    passage: int
    edge: str
    """``"before"``, ``"half"`` or ``"after"``."""

    def __str__(self) -> str:
        return f"{self.edge} {self.place} {self.passage}"


@dataclass(frozen=True)
class Clock:
    """A share of the undisturbed run's time."""

    share: float

    def __str__(self) -> str:
        return f"at {self.share:.0%} of the time"


Death = Moment | Clock


def draw_moments(counts: Mapping[str, int], number: int, rng: random.Random) -> list[Moment]:
    """Moments that cover the places as evenly as their number allows; passages and edges are drawn."""
    places = sorted(counts)
    rng.shuffle(places)
    drawn = []
    for place in (places[index % len(places)] for index in range(number)):
        edges = ("before", "half", "after") if place.startswith("write") else ("before", "after")
        drawn.append(Moment(place, rng.randint(1, counts[place]), rng.choice(edges)))
    return drawn


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal comes at once; nothing of the run goes on meanwhile


class Passages:
    """Counts in a child process how often each place is passed, and ends the process at the given moment."""

    WATCHED: ClassVar = {"rename": "rename", "replace": "rename", "link": "link"}
    REMOVING: ClassVar = {"unlink": "remove", "rmdir": "remove", "truncate": "cut"}

    def __init__(self, run_dir: Path, moment: Moment | None):
        self._run_dir, self._moment = run_dir, moment
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    @contextmanager
    def at(self, place: str, tear: Callable[[], None] = lambda: None) -> Iterator[None]:
        """A block that passes a place."""
        with self._lock:
            self.counts[place] += 1
            due = self._moment is not None and (self._moment.place, self._moment.passage) == (place, self.counts[place])
        edge = self._moment.edge if due and self._moment else None
        if edge == "half":
            tear()
        if edge in ("before", "half"):
            die()
        yield
        if edge == "after":
            die()

    def watch_files(self) -> None:
        """Pass through here whatever the run writes, renames, links, cuts and removes below its directory."""
        for name, verb in self.WATCHED.items():
            self._wrap(name, verb, lambda source, target, **_: Path(target))
        for name, verb in self.REMOVING.items():
            self._wrap(name, verb, lambda path, *_, dir_fd=None: _opened(dir_fd) / path if dir_fd else Path(path))
        self._wrap("fsync", "write", _opened, tear=_tear)

    def _wrap(
        self,
        name: str,
        verb: str,
        path_of: Callable[..., Path],
        tear: Callable[[Path], None] = lambda path: None,
    ) -> None:
        call = getattr(os, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            path = path_of(*arguments, **options)
            place = self._place(path)
            if place is None:
                return call(*arguments, **options)
            with self.at(f"{verb} {place}", lambda: tear(path)):
                return call(*arguments, **options)

        setattr(os, name, watched)

    def _place(self, path: Path) -> str | None:
        """What a path below the run directory is, e.g. ``"trainer state"``; None elsewhere."""
        if not path.is_relative_to(self._run_dir) or path == self._run_dir:
            return None
        first, *rest = path.relative_to(self._run_dir).parts
        kind = {
            "events.jsonl": "event",
            "search.jsonl": "journal",
            "recipe.json": "recipe",
            "populations": "population",
            "states": "trainer state" if any("trainer" in part for part in rest) else "state",
            "weights": "weights",
        }.get(first.removesuffix(".new"))
        if kind is None:
            return None
        removed = rest and rest[0].endswith(".old")
        return f"{'old ' if removed else ''}{kind}{' tensors' if path.suffix == '.safetensors' else ''}"


def _opened(descriptor: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}"))


def _tear(path: Path) -> None:
    """Leave what a kill in the middle of a write leaves: half of a file, of a log half of its last line."""
    if path.is_dir():
        return
    content = path.read_bytes()
    start = content.rstrip(b"\n").rfind(b"\n") + 1 if path.suffix == ".jsonl" else 0
    with path.open("r+b") as file:
        file.truncate((start + len(content)) // 2)


# ---- in the child process -------------------------------------------------------------------------


class Paid:
    """Writes down every rollout and reflection as it is begun, in a file that outlives the process."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(self, kind: str, key: Any) -> None:
        digest = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:16]
        os.write(self._file, f"{kind} {digest}\n".encode())


def watch(passages: Passages, paid: Paid, proposer: Callable[..., dict[str, str]]) -> Callable[..., dict[str, str]]:
    """Let the run's phases pass; returns the proposer to use."""
    play, play_one = Rollouter.rollout, Rollouter._rollout_one
    phase = ""

    def watched_play(self: Rollouter, tasks: Sequence[Task], draw: str, *rest: Any, **options: Any) -> Any:
        nonlocal phase
        phase = draw.partition("-")[0]
        paid.note("act", [draw, *((t.problem.index, t.candidate.digest, t.sample) for t in tasks)])
        return play(self, tasks, draw, *rest, **options)

    def watched_play_one(self: Rollouter, *arguments: Any) -> Any:
        paid.note("rollout", arguments[2].seed)
        with passages.at(f"{phase} rollout"):
            return play_one(self, *arguments)

    def propose(
        candidate: dict[str, str], reflective_dataset: Mapping[str, Any], components_to_update: list[str]
    ) -> dict[str, str]:
        key = [candidate, reflective_dataset, components_to_update]
        paid.note("act", key)
        paid.note("reflection", key)
        with passages.at("reflection"):
            return proposer(candidate, reflective_dataset, components_to_update)

    Rollouter.rollout = watched_play  # type: ignore[method-assign]
    Rollouter._rollout_one = watched_play_one  # type: ignore[method-assign, assignment]
    Trainer.step = _passing(passages, "update", Trainer.step)  # type: ignore[method-assign]
    InProcessEngine.load = _passing(passages, "load", InProcessEngine.load)  # type: ignore[method-assign]
    VLLMServer.load = _passing(passages, "load", VLLMServer.load)  # type: ignore[method-assign]
    return propose


def _passing(passages: Passages, place: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        with passages.at(place):
            return method(*arguments, **named)

    return call


def attempt(
    run_dir: Path, notes: Path, engine: str, settings: Mapping[str, Any], moment: Moment | None, subject: Subject
) -> None:
    """Compile in this (child) process, to the end or to the moment. Tells by files in ``notes``."""
    sys.stdout.flush()
    output = os.open(notes / "output", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1), os.dup2(output, 2)
    passages = Passages(run_dir, moment)
    passages.watch_files()
    propose = watch(passages, Paid(notes / "paid"), subject.proposer)
    (notes / "begun").touch()
    started = time.monotonic()
    try:
        subject.make(run_dir, engine=engine, propose=propose, **settings)
    except BaseException:
        traceback.print_exc()
        raise
    seconds = time.monotonic() - started
    (notes / "told").write_text(json.dumps({"counts": passages.counts, "seconds": seconds}))


# ---- what is compared -----------------------------------------------------------------------------


def outcome(run_dir: Path) -> dict[str, Any]:
    """Everything that a finished run left, clocks and its own place left out."""
    state = newest(run_dir)
    fields = {name: value for name, value in state["fields"].items() if not name.startswith("events_")}
    last = sorted((run_dir / "weights").iterdir())[-1]
    return {
        "events": [told(event, run_dir) for event in read_events(run_dir)],
        "populations": {path.name: read_json(path) for path in sorted((run_dir / "populations").iterdir())},
        "weights": {f"{last.name}/{path.name}": sha256_of(path) for path in sorted(last.iterdir())},
        "state": fields,
        "trainer": state["files"],
        "names": sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*")),
    }


def told(event: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """What an event says."""
    said = json.loads(json.dumps(event).replace(str(run_dir), "RUN_DIR"))
    said.pop("time")
    (said.get("report") or {}).pop("seconds", None)
    return dict(said)


def outline(left: Mapping[str, Any]) -> dict[str, Any]:
    """What is equal also when other text was sampled: the order of events, steps, versions and sizes."""
    return {
        "events": [
            [event["event"], *((event.get("report") or {}).get(name) for name in ("cycle", "step"))]
            for event in left["events"]
        ],
        "plan": next(event["budget"] for event in left["events"] if event["event"] == "plan"),
        "populations": {name: len(population["members"]) for name, population in left["populations"].items()},
        "weights": sorted(left["weights"]),
        "state": {name: left["state"][name] for name in ("cycle", "searched", "step")},
        "trainer": sorted(left["trainer"]),
    }


def newest(run_dir: Path) -> dict[str, Any]:
    """The document of the newest state; empty when there is none. Reads only: nothing is tidied up."""
    numbered = sorted(path for path in (run_dir / "states").glob("*") if path.name.isdigit())
    return (read_json(numbered[-1] / "state.json") if numbered else None) or {}


def where(run_dir: Path) -> str:
    """Where a killed run will go on."""
    if not (fields := newest(run_dir).get("fields")):
        return "the start"
    return f"{fields['searched'] + 1} searches, {fields['step']} updates"


# ---- trials ---------------------------------------------------------------------------------------


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


# ---- the table ------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="runs that are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--engine", choices=sorted(ENGINE_OPTIONS), default="in_process")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="durability-"))
    killer = Comparison(folder, options.engine)
    console, trials = Console(stderr=True), []
    for index, deaths in enumerate(plan_deaths(killer, options.kills, random.Random(options.seed))):
        trials.append(killer.trial(f"trial-{index}", *deaths))
        console.print(str(trials[-1]), markup=False, highlight=False)
    show(trials)
    figures = figures_of(trials, options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, {**(read_json(options.out) or {}), options.engine: figures})
    print(json.dumps({name: value for name, value in figures.items() if name != "trials"}))
    if figures["equal"] < figures["trials_made"]:
        sys.exit(f"unequal runs were kept in {folder}")
    shutil.rmtree(folder)


def figures_of(trials: Sequence[Trial], seed: int) -> dict[str, Any]:
    """The counts, and every trial."""
    deaths = [death for trial in trials for death in trial.deaths]
    return {
        "seed": seed,
        "trials_made": len(trials),
        "equal": sum(not trial.unequal for trial in trials),
        "deaths": sum(not death.startswith("(") for death in deaths),
        "most_acts_paid_twice": max(trial.acts_twice for trial in trials),
        "trials": list(trials),
    }


def show(trials: Sequence[Trial]) -> None:
    table = Table(title="killed, continued, compared with the undisturbed run")
    for column in ("killed", "went on from", "rollouts paid twice", "reflections paid twice", "equal"):
        table.add_column(column)
    for trial in trials:
        table.add_row(
            "\n".join(trial.deaths),
            "\n".join(trial.resumed_from),
            str(trial.rollouts_twice),
            str(trial.reflections_twice),
            f"no: {', '.join(trial.unequal)}" if trial.unequal else "yes",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
