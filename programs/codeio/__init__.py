"""CodeIO: what a Python program returns for an input."""

from programs.codeio.data import PUBLIC, generated, public_example
from programs.codeio.program import PredictOutput, metric
from programs.common import Source, Task, examples, split

__all__ = ["build"]


def build(train: int = 512, val: int = 64, test: int = 128, seed: int = 0, source: Source = "offline") -> Task:
    """Different programs, one call of each; offline they are generated and run in a sandbox.

    Raises:
        OSError: the public data set cannot be reached.
    """
    sizes = (train, val, test)
    if source == "public":
        pool = examples(PUBLIC.shuffled("train", seed), public_example)
    else:
        pool = generated(sum(sizes), seed)
    return Task(PredictOutput(), metric, *split([pool] * 3, sizes, key="code"))
