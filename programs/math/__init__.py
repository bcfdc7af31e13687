"""Math: problems with one exact answer, checked by math_verify."""

from programs.common import Source, Task, drawn, examples, split
from programs.math.data import PUBLIC, draw, public_example
from programs.math.program import Solve, metric

__all__ = ["build"]


def build(train: int = 512, val: int = 64, test: int = 128, seed: int = 0, source: Source = "offline") -> Task:
    """Different problems, offline from templates.

    Raises:
        OSError: the public data set cannot be reached.
    """
    sizes = (train, val, test)
    if source == "public":
        pool = examples(PUBLIC.shuffled("train", seed), public_example)
    else:
        pool = drawn(draw, f"math-{seed}", sizes)
    return Task(Solve(), metric, *split([pool] * 3, sizes, key="problem"))
