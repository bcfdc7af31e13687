"""HoVer: is a claim supported by documents that have to be found one after the other?"""

from typing import Literal

from programs import common
from programs.hover.data import PUBLIC, claims, public_example
from programs.hover.program import Verify, metric
from programs.hover.retrieval import Retriever, wikipedia
from programs.hover.world import documents

__all__ = ["build"]

KEPT_OFFLINE, KEPT_PUBLIC = 3, 7
"""Documents kept of a search, of 120 and of five million. Ours: not published."""


def build(
    train: int = 192,
    val: int = 48,
    test: int = 64,
    seed: int = 0,
    source: common.Source = "offline",
    *,
    split: Literal["hard", "all"] = "hard",
) -> common.Task:
    """Claims, and the program with a search engine over their documents.

    Args:
        split: "hard" has only claims that need three documents or more (HoVer's 3-hop and 4-hop claims).

    Raises:
        OSError: the public data set or its corpus cannot be reached.
        ValueError: more claims were asked for than the offline world has, 336 hard ones.
    """
    sizes = (train, val, test)
    least = 3 if split == "hard" else 2
    if source == "public":
        learn, held_out = (
            common.examples(PUBLIC.shuffled(part, seed), lambda row: public_example(row, least))
            for part in ("train", "validation")  # its test set has no labels
        )
        program = Verify(wikipedia(), KEPT_PUBLIC)
    else:
        learn = held_out = claims(seed, least)
        program = Verify(Retriever.over(documents()), KEPT_OFFLINE)
    sets = common.split([learn, learn, held_out], sizes, key="claim")
    return common.Task(program, metric, *sets)
