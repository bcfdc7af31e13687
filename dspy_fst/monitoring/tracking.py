"""A run's numbers in wandb, trackio, mlflow, tensorboard and the other trackers that accelerate knows.

Each tracker has its own thread, and a small file in the run directory, ``tracking/<name>.json``, that records which
entries it was given. So no tracker can delay or stop the run, no entry is logged twice, and a continued run goes on in
the tracker's old run where the tracker allows that.
"""

import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from dspy_fst.errors import briefly
from dspy_fst.monitoring.tracker_services import RunEnd, service_of
from dspy_fst.report.metric_names import Entry, entry_of
from dspy_fst.run.directory import Event
from dspy_fst.run.files import read_json, write_json

if TYPE_CHECKING:
    # accelerate imports torch, three seconds long: it is imported where a tracker is wanted.
    from accelerate.tracking import GeneralTracker

PROJECT = "dspy_fst"
"""Name of the project or experiment that the runs belong to."""
FOLDER = "tracking"
"""Folder in the run directory. The files of tensorboard and aim lie there, too."""
FINISH_S = 30.0
"""Seconds that a finished run waits for its trackers to take the remaining entries (ours)."""
Setting: TypeAlias = bool | int | float | str
"""A hyperparameter as every tracker takes it."""
Track: TypeAlias = "str | GeneralTracker"
"""A name that accelerate knows, or a tracker object with its own settings."""
Documents: TypeAlias = tuple[Sequence[Path], Sequence[str]]
"""Files about a run, and a sentence for each that could not be made."""


def trackers_of(track: object) -> tuple[list[Track], list[str]]:
    """The requested trackers without repetition, and a sentence for each fault in the request."""
    if isinstance(track, list | tuple) and not track:
        return [], []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

    wanted = [track] if isinstance(track, str | GeneralTracker) else track
    if not isinstance(wanted, list | tuple):
        return [], [f"track={track!r}: name a tracker, or a list of them: {', '.join(LOGGER_TYPE_TO_CLASS)}"]
    faults = [fault for tracker in wanted if (fault := _fault(tracker))]
    return ([] if faults else list({_name(tracker): tracker for tracker in wanted}.values())), faults


def _fault(tracker: object) -> str | None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
    from accelerate.utils import LoggerType

    if isinstance(tracker, GeneralTracker):
        return None
    if not isinstance(tracker, str) or tracker not in LOGGER_TYPE_TO_CLASS:
        return f"track={tracker!r}: there is no such tracker; use one of {', '.join(LOGGER_TYPE_TO_CLASS)}"
    if tracker in LoggerType.list() and tracker not in map(str, get_available_trackers()):
        return f"track={tracker!r}: it is not installed here; pip install {tracker.replace('_', '-')}"
    return None


def _name(tracker: Track) -> str:
    return tracker if isinstance(tracker, str) else str(tracker.name)


class Tracking:
    """A listener that passes the measurements of a run to trackers.

    Args:
        trackers: See `trackers_of`.
    """

    def __init__(self, trackers: Sequence[Track]):
        self._trackers = tuple(trackers)
        self._workers: list[_Worker] = []
        self._updates = 0
        self._tell: Callable[[str], None] = lambda text: None

    @contextmanager
    def following(self, run_dir: Path, events: Sequence[Event], tell: Callable[[str], None]) -> Iterator[None]:
        """A block in which events are logged. It begins once the run has passed its checks.

        Args:
            events: The earlier events. A tracker is given the entries that it does not have yet, so a tracker that is
                added to a continued run gets all of them.
            tell: Takes a sentence for the user.
        """
        self._tell, self._updates = tell, 0
        settings = hyperparameters(events)
        self._workers = [_Worker(tracker, run_dir, settings) for tracker in self._trackers]
        for event in events:
            self(event)
        end: RunEnd = "failed"
        try:
            yield
            end = "finished"
        except (KeyboardInterrupt, SystemExit):
            end = "stopped"
            raise
        finally:
            with suppress(Exception):  # a terminal that is gone must not hide why the run ended
                self._finish(end)
            self._workers = []

    def keep(self, make: Callable[[], Documents]) -> None:
        """Give files about the run to the trackers that take files. Nothing is made where none does.

        Args:
            make: Called once, in this thread. What it raises is told, and stops nothing.
        """
        takers = [worker for worker in self._workers if worker.takes_files]
        if not takers:
            return
        try:
            files, troubles = make()
        except Exception as error:
            files, troubles = (), [f"nothing about the run could be written for its trackers ({briefly(error)})"]
        for trouble in troubles:
            self._tell(f"warning: {trouble}")
        for worker in takers:
            for path in files:
                worker.keep(path)

    def __call__(self, event: Event) -> None:
        """Take one event of the run. Outside of the block nothing is logged."""
        if self._workers and (entry := entry_of(event)):
            # A search and a validation are logged at the step of the next update.
            step = entry.index if entry.group == "train" else self._updates
            self._updates = step + 1 if entry.group == "train" else step
            for worker in self._workers:
                worker.take(entry, step)
        self._tell_troubles()

    def _tell_troubles(self) -> None:
        """Report the troubles in the run's thread: other listeners must not be called from the trackers' threads."""
        for worker in self._workers:
            while worker.troubles:
                self._tell(worker.troubles.pop(0))

    def _finish(self, end: RunEnd) -> None:
        for worker in self._workers:
            worker.end(end)
        until = time.monotonic() + FINISH_S
        for worker in self._workers:
            worker.wait(until)
        self._tell_troubles()


def hyperparameters(events: Sequence[Event]) -> dict[str, Setting]:
    """The recipe, program, model, engine and metric as one flat mapping.

    They come from the event of the plan, from which secrets were removed.
    """
    plan = next((event for event in reversed(events) if event["event"] == "plan" and "config" in event), {})
    subject = {name: plan[name] for name in ("program", "model", "engine", "metric") if name in plan}
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in {**plan.get("config", {}), **subject}.items()
    }


@dataclass
class _Ledger:
    """Which entries a tracker was given. The file is written before the entry is logged, so none is logged twice."""

    path: Path
    identity: str | None = None
    configured: bool = False
    logged: dict[str, int] = field(default_factory=dict)
    """Group, e.g. ``"train"``, -> index of its newest entry."""
    lost: int = 0

    @classmethod
    def read(cls, path: Path) -> "_Ledger":
        saved = read_json(path)
        return cls(path, **saved) if isinstance(saved, dict) else cls(path)

    def write(self) -> None:
        self.path.parent.mkdir(exist_ok=True)
        write_json(self.path, {name: value for name, value in asdict(self).items() if name != "path"})

    def holds(self, entry: Entry) -> bool:
        return entry.index <= self.logged.get(entry.group, -1)


class _Worker:
    """One tracker and the thread that calls it."""

    def __init__(self, tracker: Track, run_dir: Path, settings: Mapping[str, Setting]):
        self.name = _name(tracker)
        self.troubles: list[str] = []
        self._tracker, self._run_dir, self._settings = tracker, run_dir, settings
        self._service = service_of(tracker)
        self._ledger = _Ledger(run_dir / FOLDER / (re.sub(r"[^\w.-]", "_", self.name) + ".json"))
        self._reported: set[str] = set()
        self._lost = 0
        self._todo: queue.SimpleQueue[tuple[Entry, int] | Path | RunEnd] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
        self._thread.start()

    def take(self, entry: Entry, step: int) -> None:
        self._todo.put((entry, step))

    @property
    def takes_files(self) -> bool:
        return self._service.keep is not None

    def keep(self, path: Path) -> None:
        self._todo.put(path)

    def end(self, end: RunEnd) -> None:
        self._todo.put(end)

    def wait(self, until: float) -> None:
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            waiting = self._todo.qsize() + 1  # and the one that it is at
            self.troubles.append(
                f"warning: the run waited {FINISH_S:g} s for tracker {self.name!r} to take its last entries, and ends "
                f"without it; {waiting} entries and files of the run are not there. Is its server reachable?"
            )

    def _work(self) -> None:
        tracker = None
        with self._surviving("could not be started"):
            self._ledger = _Ledger.read(self._ledger.path)
        with self._surviving(*self._not_started()):
            tracker = self._start()
        while not isinstance(item := self._todo.get(), str):
            self._take(tracker, item)
        if tracker is not None:
            with self._surviving("did not finish well"):
                self._service.finish(tracker, item)
        if self._lost:
            with self._surviving("left no count of what it lost"):
                self._ledger.write()
            self.troubles.append(f"warning: tracker {self.name!r} lost {self._lost} of the run's entries")

    def _not_started(self) -> tuple[str, str]:
        """What is told when the tracker cannot be started, and what helps."""
        if self._ledger.identity is None:
            return "could not be started", ""
        remedy = f"; where its run is gone, remove {self._ledger.path}, and the next start begins a new one"
        return f"could not go on in its run {self._ledger.identity}", remedy

    def _start(self) -> "GeneralTracker":
        from accelerate import PartialState

        PartialState()  # without it accelerate's trackers for wandb and trackio raise once they have begun a run
        tracker = self._create(self._tracker) if isinstance(self._tracker, str) else self._tracker
        tracker.start()
        if self._service.identity is not None:
            self._ledger.identity = str(self._service.identity(tracker.tracker))
        configured, self._ledger.configured = self._ledger.configured, True
        self._ledger.write()
        if not configured or self._service.forgets:
            with self._surviving("did not take the recipe"):
                tracker.store_init_configuration(dict(self._settings))
        return tracker

    def _create(self, name: str) -> "GeneralTracker":
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind, service, identity = LOGGER_TYPE_TO_CLASS[name], self._service, self._ledger.identity
        options: dict[str, str] = {}
        if identity:
            options = service.continued(identity)
        elif service.named:
            options = {service.named: self._run_dir.name}
        if kind.requires_logging_directory:
            return kind(name, str(self._run_dir / FOLDER), **options)
        return kind(PROJECT, **options)

    def _take(self, tracker: "GeneralTracker | None", item: tuple[Entry, int] | Path) -> None:
        if not isinstance(item, Path):
            entry, step = item
            if not self._ledger.holds(entry):
                self._log(tracker, entry, step)
        elif tracker is not None and self._service.keep is not None:
            with self._surviving(f"did not take {item.name}"):
                self._service.keep(tracker, item)

    def _log(self, tracker: "GeneralTracker | None", entry: Entry, step: int) -> None:
        logged = False
        if tracker is not None:
            with self._surviving("failed"):
                self._ledger.logged[entry.group] = entry.index
                self._ledger.write()
                tracker.log(dict(entry.values), step=step)
                logged = True
        if not logged:
            self._lost += 1
            self._ledger.lost += (
                tracker is not None
            )  # a tracker that never started gets its entries when the run is continued

    @contextmanager
    def _surviving(self, what: str, remedy: str = "") -> Iterator[None]:
        """A block that calls the tracker. Each kind of failure is reported once and does not stop the run."""
        try:
            yield
        except (Exception, SystemExit) as error:
            if what not in self._reported:
                words = f"{type(error).__name__}: {' '.join(str(error).split())}"
                self.troubles.append(f"warning: tracker {self.name!r} {what} ({words}); the run goes on{remedy}")
                self._reported.add(what)
