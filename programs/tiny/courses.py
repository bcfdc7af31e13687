"""All that the base is taught: the skills of HoVer and Reckon, and the answers to the other programs' problems."""

import random
from collections.abc import Callable
from functools import cache

import dspy

from programs import codeio, math, physics, star_graph
from programs.codeio.data import generated
from programs.common import Task
from programs.hover import skills as of_hover
from programs.math.data import draw as draw_math
from programs.physics.data import draw as draw_physics
from programs.reckon import skills as of_reckon
from programs.star_graph.data import drawer
from programs.tiny.skills import Course, Inputs, Skill

POOL = 2000
"""Problems of each program that has one predictor; drawn with a seed that `build` is not given."""
GRAPH = {"degree": 2, "length": 2}
"""Star graphs of the size that the base is taught."""


def courses() -> list[Course]:
    """All that is taught, shares summing up to 1."""
    small = {"train": 1, "val": 1, "test": 1}
    return [
        *of_hover.courses(),
        *of_reckon.courses(),
        _answers("star_graph", star_graph.build(**small, **GRAPH), drawer(**GRAPH), "path", "find the path", 4),
        _answers("codeio", codeio.build(**small), None, "output", "run the program", 1),
        _answers("math", math.build(**small), draw_math, "answer", "solve the problem", 3),
        _answers("physics", physics.build(**small), draw_physics, "answer", "choose the right letter", 2),
    ]


def _answers(
    name: str,
    task: Task,
    draw: Callable[[random.Random], dspy.Example] | None,
    output: str,
    wording: str,
    problems: int,
) -> Course:
    """The one predictor of a program, taught by its problems' answers; without `draw` those of CodeIO."""
    skill = Skill("answer", lambda inputs: str(inputs[output]), (wording,))
    (found,) = task.program.named_predictors()
    return Course(name, found[1], (skill,), lambda rng: rng.choice(_pool(name, draw)), share=0.03, problems=problems)


@cache
def _pool(name: str, draw: Callable[[random.Random], dspy.Example] | None) -> list[Inputs]:
    if draw is None:
        return [example.toDict() for example in generated(POOL, seed=-1)]  # `build` draws with seeds from 0
    rng = random.Random(f"tiny-{name}")
    return [draw(rng).toDict() for _ in range(POOL)]
