"""Copies of published folders on machines that do not see them, by Ray's object store.

The contract of this file:

- A folder travels in chunks, so that no process holds it whole. The chunks live in the store while machines take them,
  once for all machines that take them at the same time.
- A copy appears under its name when it is whole. A folder that was written anew has another name.
- A machine keeps the newest copies only, and none after its server. What a killed one left behind is removed by the
  next server there.
- Whether a copy is right is found out as for every publish: the server's workers compare what they use with it, and
  the run compares what they read with what it wrote.
"""

import hashlib
import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import ray
from filelock import FileLock, Timeout
from ray import ObjectRef

CHUNK_BYTES = 2**28
"""Of a file, in one object of the store (ours)."""
PREFIX = "dspy-fst-weights-"
ALIVE = ".alive"
"""Locked by the process whose copies lie beside it."""
LOCK_S = 60.0
"""Longest wait for another server that starts on this machine (ours)."""
Listed = tuple[str, int, int]
"""A file of a folder: its path there, its bytes, and when it was written, in nanoseconds."""


@dataclass(frozen=True)
class StoredFolder:
    """A folder that lies in the object store."""

    name: str
    """Of the copy."""
    files: "tuple[tuple[str, tuple[ObjectRef[bytes], ...]], ...]"
    """Path in the folder, and the chunks of the file."""


@dataclass
class _InStore:
    """A folder in the store, or on its way there."""

    takers: int = 0
    sent: StoredFolder | None = None
    putting: threading.Lock = field(default_factory=threading.Lock)


class Sending:
    """Puts folders of this machine into the store. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stored: dict[str, _InStore] = {}

    @contextmanager
    def sent(self, name: str, folder: Path) -> Iterator[StoredFolder]:
        """The folder in the store, in this block.

        Args:
            name: By `Names.name`.
            folder: Where it lies.

        Raises:
            OSError: a file cannot be read.
        """
        with self._lock:
            stored = self._stored.setdefault(name, _InStore())
            stored.takers += 1
        try:
            with stored.putting:
                if stored.sent is None:
                    parts = sorted(part for part, *_ in _listing(folder))
                    stored.sent = StoredFolder(name, tuple((part, _chunks(folder / part)) for part in parts))
            yield stored.sent
        finally:
            with self._lock:
                stored.takers -= 1
                if not stored.takers:
                    del self._stored[name]


class Names:
    """Names of the copies of folders. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Path, tuple[str, frozenset[Listed]]] = {}

    def name(self, folder: Path) -> str:
        """Of a copy of the folder as it is now. One that is removed, or being removed, is the one that it was before.

        Raises:
            FileNotFoundError: it is not there, and was not before.
        """
        listing = _listing(folder)
        with self._lock:
            if (known := self._known.get(folder)) is not None and listing <= known[1]:
                return known[0]
            if not listing:
                raise FileNotFoundError(f"{folder} is not there")
            told = repr((str(folder), sorted(listing)))
            name = f"{folder.name}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
            self._known[folder] = name, listing
            return name


def _listing(folder: Path) -> frozenset[Listed]:
    """The files that are there now."""
    found: set[Listed] = set()
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            if file.is_file():
                status = file.stat()
                found.add((str(file.relative_to(folder)), status.st_size, status.st_mtime_ns))
    return frozenset(found)


def _chunks(file: Path) -> "tuple[ObjectRef[bytes], ...]":
    with file.open("rb") as source:
        return tuple(ray.put(chunk) for chunk in iter(lambda: source.read(CHUNK_BYTES), b""))


class Copies:
    """The copies of one server on its machine. Thread-safe.

    Args:
        keep: How many it keeps beside the first.
        keep_first: Whether the first one stays, as the base of LoRA adapters does.
    """

    def __init__(self, keep: int, *, keep_first: bool):
        place = Path(tempfile.gettempdir())
        with FileLock(place / f"{PREFIX}{os.getuid()}.lock", timeout=LOCK_S):
            _remove_left_behind(place)
            self._scratch = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
            self._alive = FileLock(self._scratch / ALIVE)
            self._alive.acquire()
        self._keep, self._keep_first = keep, keep_first
        self._first: str | None = None
        self._used: OrderedDict[str, None] = OrderedDict()
        """Names, the one used last at the end."""
        self._lock = threading.RLock()

    def find(self, name: str) -> Path | None:
        """The copy of this name; None where there is none."""
        with self._lock:
            if name in self._used:
                self._used.move_to_end(name)
            elif name != self._first:
                return None
            return self._scratch / name

    def take(self, sent: StoredFolder) -> Path:
        """Copy a folder, unless it was, and remove copies that were not used for long.

        Raises:
            OSError: the copy cannot be written.
            RayError: a chunk was lost.
        """
        with self._lock:
            if (found := self.find(sent.name)) is not None:
                return found
            self._write(sent)
            if self._keep_first and self._first is None:
                self._first = sent.name
            else:
                self._used[sent.name] = None
            while len(self._used) > self._keep:
                shutil.rmtree(self._scratch / self._used.popitem(last=False)[0], ignore_errors=True)
            return self._scratch / sent.name

    def _write(self, sent: StoredFolder) -> None:
        part = self._scratch / f"{sent.name}.part"
        try:
            for name, chunks in sent.files:
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                with (part / name).open("wb") as file:
                    for chunk in chunks:
                        file.write(ray.get(chunk))
            part.rename(self._scratch / sent.name)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise

    def close(self) -> None:
        """Remove all copies. May be called twice."""
        self._alive.release()
        shutil.rmtree(self._scratch, ignore_errors=True)


def _remove_left_behind(place: Path) -> None:
    """Remove the copies of processes that are gone: their lock is free, whichever container they were in."""
    for folder in place.glob(f"{PREFIX}*"):
        if folder.is_dir():
            with suppress(Timeout, OSError), FileLock(folder / ALIVE, timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
