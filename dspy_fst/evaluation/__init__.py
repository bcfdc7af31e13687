"""Scores after a run: mean@k with intervals, the two-by-two of weights and texts, drift.

In: programs and problems, or a run's directory. Out: measurements. The run's own files are only read.
"""

import warnings

from dspy_fst.errors import imported


def __getattr__(name: str) -> object:
    """Names of the module that this package was in release 0.1; gone after release 0.2."""
    measure = None if name.startswith("_") else imported("dspy_fst.evaluation.two_by_two_table")
    if measure is None or not hasattr(measure, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is {measure.__name__}.{name} now", FutureWarning, 2)
    found: object = getattr(measure, name)
    return found
