"""Physics: multiple choice."""

from programs.common import Source, Task, drawn, examples, split
from programs.physics.data import PUBLIC, draw, public_example
from programs.physics.program import Choose, metric

__all__ = ["build"]


def build(train: int = 512, val: int = 64, test: int = 128, seed: int = 0, source: Source = "offline") -> Task:
    """Different questions, offline from formulae.

    Raises:
        OSError: the public data set cannot be reached.
    """
    sizes = (train, val, test)
    if source == "public":
        pool = examples(PUBLIC.shuffled("test", seed), public_example)  # its only split
    else:
        pool = drawn(draw, f"physics-{seed}", sizes)
    return Task(Choose(), metric, *split([pool] * 3, sizes, key="question"))
