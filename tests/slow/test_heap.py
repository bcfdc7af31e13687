"""Freed tensors go back to the system: the C library is told once, on a CPU, where it can be told."""

import ctypes
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dspy_fst.slow import heap
from dspy_fst.slow.heap import MAPPED_BYTES, map_large_tensors
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from programs.lab import BASE

ON_GLIBC = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    map_large_tensors.cache_clear()
    yield
    map_large_tensors.cache_clear()


class Library:
    """A C library that notes what it is told."""

    def __init__(self):
        self.told = []

    def mallopt(self, parameter: int, value: int) -> int:
        self.told.append((parameter, value))
        return 1


def test_a_trainer_that_computes_layers_again_on_a_cpu_tells_glibc_once(monkeypatch):
    library = Library()
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(heap.sys, "platform", "linux")
    Trainer(BASE, TrainingSettings(), device="cpu")
    assert library.told == []
    for _ in range(2):
        Trainer(BASE, TrainingSettings(gradient_checkpointing=True), device="cpu")
    assert library.told == [(-3, MAPPED_BYTES)]


def test_another_system_or_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())  # as musl: there is no mallopt
    monkeypatch.setattr(heap.sys, "platform", "linux")
    assert not map_large_tensors()
    map_large_tensors.cache_clear()
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: pytest.fail("asked for a library"))
    monkeypatch.setattr(heap.sys, "platform", "darwin")
    assert not map_large_tensors()


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_user_set_from_outside_stands(name, monkeypatch):
    monkeypatch.setenv(name, "glibc.malloc.mmap_threshold=65536")
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: pytest.fail("asked for a library"))
    assert not map_large_tensors()


HOLES = """
import torch
from pathlib import Path
from dspy_fst.slow.heap import map_large_tensors
{told}

def resident():
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmRSS")).split()[1])

del_first = torch.ones(6 * 2**20)  # 24 MiB; freed, it raises glibc's own threshold
del del_first
before = resident()
kept = []
for _ in range(20):  # a large tensor that goes, and a smaller one after it that stays
    large = torch.ones(2**22)
    kept.append(torch.ones(2**15))
    kept.append(large)
    large = None
kept = kept[::2]
print((resident() - before) // 1024)
"""


@pytest.mark.skipif(not ON_GLIBC, reason="another C library")
def test_holes_between_tensors_that_stay_go_back_to_the_system():
    def grown(told: str) -> int:
        source = textwrap.dedent(HOLES).format(told=told)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC", "GLIBC"))}
        ended = subprocess.run(
            [sys.executable, "-c", source], capture_output=True, text=True, env=environment, timeout=120
        )
        assert ended.returncode == 0, ended.stderr
        return int(ended.stdout)

    kept = 20 * 2**15 * 4 // 2**20
    assert grown("map_large_tensors()") <= kept + 10
    assert grown("") > 200, "glibc gives holes back by itself now: the module may go"


FLAGS = """
{imported}
import torch
from pathlib import Path

kept = torch.ones(2**24)  # 64 MiB
middle, inside = kept.data_ptr() + 2**25, False
for line in Path("/proc/self/smaps").read_text().splitlines():
    name, *values = line.split()
    if not name.endswith(":"):  # a mapping's head: its addresses
        first, end = (int(address, 16) for address in name.split("-"))
        inside = first <= middle < end
    elif inside and name == "VmFlags:":
        print(*values)
"""
ASKED = "hg"
"""Of a mapping for which huge pages were asked (proc_pid_smaps(5)). Whether it gets them depends on the machine."""
SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not SYSTEM.is_file(), reason="the system has no such pages")
def test_huge_pages_are_asked_for_a_large_tensor_unless_the_user_said_otherwise():
    def flags(imported: str, **settings: str) -> list[str]:
        environment = {**os.environ, **settings}
        if not settings:
            environment.pop("THP_MEM_ALLOC_ENABLE", None)
        command = [sys.executable, "-c", FLAGS.format(imported=imported)]
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert ended.returncode == 0, ended.stderr
        assert "rd" in ended.stdout.split(), "the tensor's mapping was not found"
        return ended.stdout.split()

    assert ASKED in flags("import dspy_fst")
    assert ASKED not in flags(""), "torch asks by itself now: the setting may go"
    assert ASKED not in flags("import dspy_fst", THP_MEM_ALLOC_ENABLE="0")
