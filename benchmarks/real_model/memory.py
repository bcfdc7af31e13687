"""How much memory a run takes at most, with all its processes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

EVERY_S = 0.5


@dataclass
class Peak:
    """The most that was seen."""

    gib: float = 0.0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Watch this process and its children at any depth; memory that they share counts once for each."""
    peak, ended = Peak(), threading.Event()

    def watch() -> None:
        while not ended.wait(EVERY_S):
            peak.gib = max(peak.gib, _resident() / 2**30)

    watcher = threading.Thread(target=watch, name="peak-memory", daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def _resident() -> int:
    own = psutil.Process()
    total = 0
    for process in [own, *own.children(recursive=True)]:
        with suppress(psutil.Error):  # it has ended meanwhile
            total += process.memory_info().rss
    return total
