"""The paper's claims, a file each: how its table follows from raw lines."""

from collections.abc import Callable
from types import ModuleType

from benchmarks.evidence.claims import (
    aims,
    bound,
    ceiling,
    continual,
    costs,
    drift,
    efficiency,
    entropy,
    first_signal,
    plasticity,
    sensitivity,
    two_by_two,
)

CLAIMS: tuple[ModuleType, ...] = (
    aims,
    bound,
    ceiling,
    continual,
    costs,
    drift,
    efficiency,
    entropy,
    first_signal,
    plasticity,
    sensitivity,
    two_by_two,
)
TABLES: dict[str, Callable[..., str]] = {module.__name__.rpartition(".")[2]: module.rows for module in CLAIMS}
"""Claim -> (raw lines, world, base) -> its table in Markdown."""
