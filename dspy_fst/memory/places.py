"""Where a run takes something: cards, main memory and disk; what is free there, on this machine or an imagined one."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from dspy_fst.engine.devices import free_gpu_bytes, free_second_gpu_bytes
from dspy_fst.run.written import GIB

MEMORY, GPU, DISK = "memory", "GPU memory", "disk"
SECOND_GPU = "GPU memory of the second card"
UNKNOWN = sys.maxsize
"""Free bytes of a place that nobody looked at: anything fits."""
CUDA_CONTEXT = GIB // 2
"""Of a card, for the trainer's CUDA context and kernels: assumed, never measured here."""


@dataclass(frozen=True)
class Room:
    """What is free, in bytes."""

    free: Mapping[str, int]
    """Place -> bytes; ``GPU`` only where there is a card, ``SECOND_GPU`` only where there are two."""
    gpu_total: int = 0
    """Bytes of one whole card; of two they are alike, or the first counts."""
    imagined: bool = False
    """Whether it is a machine that the user described, not this one."""

    @property
    def on_gpu(self) -> bool:
        return GPU in self.free


def room_now(run_dir: Path) -> Room:
    """What is free on this machine; a run that goes on in ``run_dir`` has part of what it needs there."""
    disk = shutil.disk_usage(nearest_folder(run_dir))
    kept = [path.lstat() for name in ("weights", "states") for path in (run_dir / name).rglob("*")]
    held = sum({stat.st_ino: stat.st_size for stat in kept}.values())  # states share files under several names
    # Made-up file systems tell 0 of everything: that is unknown, not full.
    free = {MEMORY: free_memory(), DISK: disk.free + held if disk.total else UNKNOWN}
    gpu = free_gpu_bytes()
    if gpu is None:
        return Room(free)
    second = free_second_gpu_bytes()
    return Room({GPU: gpu[0], **({} if second is None else {SECOND_GPU: second}), **free}, gpu[1])


def imagined_room(card: int, cards: int = 1) -> Room:
    """A machine with empty cards of ``card`` bytes each, and as much main memory and disk as it takes.

    With two cards the trainer has the first, and the engine the second: nothing is sharded.
    """
    second = {SECOND_GPU: card} if cards == 2 else {}
    return Room({GPU: card - CUDA_CONTEXT, **second, MEMORY: UNKNOWN, DISK: UNKNOWN}, card, imagined=True)


def free_memory(root: Path = Path("/")) -> int:
    """Main memory, swap included, that this process may still take: what is free, or what its control groups leave.

    Args:
        root: Where ``/proc`` and ``/sys`` are.
    """
    free: int = psutil.virtual_memory().available + psutil.swap_memory().free
    return min([free, *_left_by_control_groups(root)])


def _left_by_control_groups(root: Path) -> Iterator[int]:
    """What each memory limit above this process leaves; psutil knows of none."""
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, name = line.split(":", 2)
        if controllers == "":  # version 2
            mount, limit, used, pages = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):  # version 1
            mount, limit = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            used, pages = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        lowest = mount / name.strip("/")
        for group in (folder for folder in (lowest, *lowest.parents) if folder.is_relative_to(mount)):
            try:
                most, taken = (group / limit).read_text().strip(), int((group / used).read_text())
                facts = dict(fact.split() for fact in (group / "memory.stat").read_text().splitlines())
            except OSError:
                continue  # the topmost group has no limit, and a container does not see those above its own
            if most != "max":
                yield int(most) - taken + int(facts.get(pages, 0))  # pages of files are given back on demand


def nearest_folder(path: Path) -> Path:
    """The path itself or the nearest of its parents that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def writable_fault(run_dir: Path) -> str | None:
    """Why nothing can be written into a run directory, found by writing; None when it can. Nothing is left behind."""
    where = f"run_dir={str(run_dir)!r}"
    try:
        folder = nearest_folder(run_dir)
        if not folder.is_dir():
            return f"{where}: {'it' if folder == run_dir else folder} is a file; name a directory"
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except (OSError, ValueError) as error:
        return f"{where}: nothing can be written there ({error}); name another directory"
    return None
