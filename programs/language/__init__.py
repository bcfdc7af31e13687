"""Three small tasks in English whose house rules only feedback shows: `desk`, `slips` and `almanac`.

All texts are made of our own phrases. Each module has `build`, which returns a `programs.common.Task`, `EXPERT`, what
somebody who knows the rules would write, and a program whose demos show the form and no rule. Every set is drawn by a
named generator and shares no problem with another.
"""

from collections.abc import Callable

from programs.common import Task
from programs.language import almanac, desk, slips

__all__ = ["EXPERT", "TASKS"]

TASKS: dict[str, Callable[..., Task]] = {"desk": desk.build, "slips": slips.build, "almanac": almanac.build}
EXPERT: dict[str, dict[str, str]] = {"desk": desk.EXPERT, "slips": slips.EXPERT, "almanac": almanac.EXPERT}
"""Task -> predictor -> its instruction."""
