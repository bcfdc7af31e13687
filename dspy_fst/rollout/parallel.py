"""The one place that changes how DSPy 3.4's ParallelExecutor works: inside a rollout it submits each call once.

dspy.Parallel submits a call again that is slower than its limit (120 s), uses the first of the two answers and leaves
the other running. The calls of both would be recorded, and a call that the program never used would be trained on
with the program's reward. A rollout has a time limit of its own (``rollout_timeout_s``). Outside of a rollout nothing
changes.
"""

import functools
from collections.abc import Callable
from typing import Any

import dspy
from dspy.utils.parallelizer import ParallelExecutor

from dspy_fst.rollout.call_recorder import SETTING, Recording

_MARK = "_fst_once"


def parallel_calls_once() -> None:
    """Make it so; again and again it does nothing more."""
    execute = ParallelExecutor.execute
    if not hasattr(execute, _MARK):
        setattr(ParallelExecutor, "execute", _once(execute))  # noqa: B010 (a plain assignment is refused by mypy)


def _once(execute: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(execute)
    def once(self: ParallelExecutor, function: Callable[..., Any], data: Any) -> Any:
        if isinstance(dspy.settings.get(SETTING), Recording):
            self.timeout = 0  # DSPy's word for: never submit again
        return execute(self, function, data)

    setattr(once, _MARK, True)
    return once
