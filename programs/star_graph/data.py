"""Star graphs: arms of equal length that meet in one node, their edges in random order."""

import random
from collections.abc import Callable
from itertools import pairwise

import dspy

NODES = 100
"""Node numbers run from 0 to 99."""


def drawer(degree: int, length: int) -> Callable[[random.Random], dspy.Example]:
    """A generator of graphs with `degree` arms of `length` edges.

    Raises:
        ValueError: no such graph, or it has more nodes than there are numbers.
    """
    if degree < 2 or length < 1 or degree * length + 1 > NODES:
        raise ValueError(
            f"degree={degree}, length={length}: take at least 2 arms of at least 1 edge, and at most {NODES} nodes "
            f"(degree * length + 1)"
        )
    return lambda rng: draw(rng, degree, length)


def draw(rng: random.Random, degree: int, length: int) -> dspy.Example:
    """One problem: {edges, source, goal} -> path; the goal is the end of an arm."""
    source, *rest = rng.sample(range(NODES), degree * length + 1)
    arms = [[source, *rest[i * length : (i + 1) * length]] for i in range(degree)]
    edges = [f"{a}>{b}" for arm in arms for a, b in pairwise(arm)]
    rng.shuffle(edges)
    path = rng.choice(arms)
    return dspy.Example(
        edges=" ".join(edges), source=str(source), goal=str(path[-1]), path=" ".join(map(str, path))
    ).with_inputs("edges", "source", "goal")
