"""HoVer: is a claim supported by documents that have to be found one after the other?"""

from typing import Literal

from programs import common
from programs.hover.data import PUBLIC, claims, public_example
from programs.hover.program import HOPS, Verify, metric
from programs.hover.retrieval import Retriever, wikipedia
from programs.hover.world import documents

__all__ = ["build"]

KEPT_OFFLINE, KEPT_PUBLIC = 3, 7
"""Documents kept of a search, of 120 and of five million. Ours: not published."""
DOCUMENTS = {"hard": (3,), "all": (2, 3), "short": (2,)}
"""How many documents the offline claims of a split need."""


def build(
    train: int = 192,
    val: int = 48,
    test: int = 64,
    seed: int = 0,
    source: common.Source = "offline",
    *,
    split: Literal["hard", "all", "short"] = "hard",
    kept: int | None = None,
) -> common.Task:
    """Claims, and the program with a search engine over their documents.

    Args:
        split: "hard" has only claims that need three documents or more (HoVer's 3-hop and 4-hop claims), "short",
            offline, only those that need two, and a program that searches twice.
        kept: Documents kept of a search; None takes 3 of the 120 offline, 7 of the public five million.

    Raises:
        OSError: the public data set or its corpus cannot be reached.
        ValueError: more claims were asked for than the offline world has, 336 hard and 192 short ones; or short public
            ones.
    """
    sizes = (train, val, test)
    if split == "short" and source == "public":
        raise ValueError("split='short' has offline claims only; take split='all' or source='offline'")
    if source == "public":
        least = 3 if split == "hard" else 2
        learn, held_out = (
            common.examples(PUBLIC.shuffled(part, seed), lambda row: public_example(row, least))
            for part in ("train", "validation")  # its test set has no labels
        )
        program = Verify(wikipedia(), kept or KEPT_PUBLIC)
    else:
        learn = held_out = claims(seed, DOCUMENTS[split])
        program = Verify(Retriever.over(documents()), kept or KEPT_OFFLINE, 2 if split == "short" else HOPS)
    sets = common.split([learn, learn, held_out], sizes, key="claim")
    return common.Task(program, metric, *sets)
