"""How much is free on cards, in main memory and on the disk, of this machine or of one that the user describes."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from dspy_fst.engine.machine import free_gpu_bytes, free_second_gpu_bytes
from dspy_fst.formatting.numbers import GIB

MEMORY, GPU, DISK = "memory", "GPU memory", "disk"
SECOND_GPU = "GPU memory of the second card"
UNKNOWN = sys.maxsize
"""Free bytes of a place that was not inspected: anything fits."""
CUDA_CONTEXT = GIB // 2
"""GPU memory for the trainer's CUDA context and kernels (assumed, not measured)."""


@dataclass(frozen=True)
class Available:
    """Free bytes, place by place.

    >>> Available({GPU: 24 * GIB, MEMORY: 64 * GIB, DISK: 500 * GIB}, gpu_total=24 * GIB).on_gpu
    True
    """

    free: Mapping[str, int]
    """Place -> bytes. ``GPU`` is a key only where there is a card, ``SECOND_GPU`` only where there are two."""
    gpu_total: int = 0
    """Bytes of one whole card; of the first where there are two."""
    imagined: bool = False
    """Whether the user described the machine, e.g. with ``--gpu 24GiB``; else it is this one."""

    @property
    def on_gpu(self) -> bool:
        return GPU in self.free


def available_now(run_dir: Path) -> Available:
    """What is free on this machine. Weights and states that ``run_dir`` holds already count as free disk."""
    disk = shutil.disk_usage(nearest_folder(run_dir))
    present = [path.lstat() for name in ("weights", "states") for path in (run_dir / name).rglob("*")]
    kept = sum({stat.st_ino: stat.st_size for stat in present}.values())  # states share files under several names
    # Virtual file systems report a total of 0. That means unknown, not full.
    free = {MEMORY: free_memory(), DISK: disk.free + kept if disk.total else UNKNOWN}
    gpu = free_gpu_bytes()
    if gpu is None:
        return Available(free)
    second = free_second_gpu_bytes()
    return Available({GPU: gpu[0], **({} if second is None else {SECOND_GPU: second}), **free}, gpu[1])


def imagined_machine(card: int, cards: int = 1) -> Available:
    """A machine with empty cards of ``card`` bytes each and unlimited main memory and disk.

    With two cards the trainer has the first and the engine the second. Nothing is sharded.
    """
    second = {SECOND_GPU: card} if cards == 2 else {}
    return Available({GPU: card - CUDA_CONTEXT, **second, MEMORY: UNKNOWN, DISK: UNKNOWN}, card, imagined=True)


def free_memory(root: Path = Path("/")) -> int:
    """Main memory, swap included, that this process may still take: what is free, and no more than its control groups
    allow.

    Args:
        root: Where ``/proc`` and ``/sys`` are.
    """
    free: int = psutil.virtual_memory().available + psutil.swap_memory().free
    return min([free, *_left_by_control_groups(root)])


def _left_by_control_groups(root: Path) -> Iterator[int]:
    """What each memory limit above this process leaves; psutil reads none of them."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else ():
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
                continue  # the topmost group has no limit, and a container does not see groups above its own
            if most != "max":
                yield int(most) - taken + int(facts.get(pages, 0))  # cached file pages are released on demand


def nearest_folder(path: Path) -> Path:
    """The path itself or the nearest of its parents that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def writable_fault(run_dir: Path) -> str | None:
    """Why nothing can be written into a run directory; None when it can. Tried with a file that is removed again."""
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
