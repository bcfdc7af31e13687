"""The parts of the check, in their order, and how long each may take."""

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One process of the check."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    """Most seconds from its turn on; the last part also gets what the others left."""
    least_s: float = 15.0
    """With fewer seconds left it is skipped."""
    kind: str = "rows"
    """``"pytest"``: its rows are read from pytest's output."""


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"benchmarks.gpu_check.{name}", *arguments)


PYTEST = (sys.executable, "-m", "pytest", "-v", "-m", "gpu and not vllm", "--tb=short", "-p", "no:cacheprovider")
NOT_THE_DEMO = ("-k", "not demo")
"""The laboratory's demo alone took more than a minute of the eight on an H100."""
TESTS = "tests/test_gpu.py"
"""All tests marked gpu are in this file; the rest of tests/ imports more than another machine has."""
PARTS = (
    Part("tests marked gpu", (*PYTEST, *NOT_THE_DEMO, TESTS), limit_s=80.0, kind="pytest"),
    Part("log-ratio", _module("log_ratio", "0.5B"), limit_s=45.0),
    Part("update 0.5B", _module("update", "0.5B"), limit_s=60.0),
    Part("update 1.7B", _module("update", "1.7B"), limit_s=60.0),
    Part("update 4B", _module("update", "4B"), limit_s=130.0),
    Part("update 8B", _module("update", "8B"), limit_s=110.0),
    Part("FST and RL", _module("fst_and_rl"), limit_s=90.0, least_s=45.0),
)
REHEARSAL = (
    Part("tests marked gpu", (*PYTEST, TESTS), limit_s=200.0, kind="pytest"),
    Part("log-ratio", _module("log_ratio", "tiny"), limit_s=200.0),
    Part("update tiny", _module("update", "tiny"), limit_s=200.0),
    Part("FST and RL", _module("fst_and_rl", "--tiny"), limit_s=60.0, least_s=30.0),
)
"""The same code on the CPU with models of a few thousand parameters."""
