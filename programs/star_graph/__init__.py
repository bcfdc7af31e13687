"""Star graph: the path from the centre of a star to the end of one of its arms."""

from programs.common import Source, Task, drawn, split
from programs.star_graph.data import drawer
from programs.star_graph.program import FindPath, metric

__all__ = ["build"]


def build(
    train: int = 512,
    val: int = 64,
    test: int = 128,
    seed: int = 0,
    source: Source = "offline",
    *,
    degree: int = 5,
    length: int = 5,
) -> Task:
    """Draw `train` + `val` + `test` different graphs.

    Args:
        source: Both are the same here: the task is generated, in the paper too.
        degree: Arms of a star.
        length: Edges of an arm.
    """
    sizes = (train, val, test)
    pool = drawn(drawer(degree, length), f"star_graph-{degree}-{length}-{seed}", sizes)
    return Task(FindPath(), metric, *split([pool] * 3, sizes, key="edges"))
