"""Counts in a child process how often each place is passed, and ends it at its moment."""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.durability.moments import Moment, die


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
