"""What the bases are taught: Reckon's skills in words, and what an expert answers in the paper's programs."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dspy

from programs import codeio, hover, math, physics, star_graph
from programs.codeio.data import generated
from programs.hover.expert import watched
from programs.math.data import draw as draw_math
from programs.physics.data import draw as draw_physics
from programs.reckon import skills as of_reckon
from programs.star_graph.data import drawer
from programs.tiny.skills import Course, Inputs, Skill

POOL = 2000
"""Problems of each program that has one predictor; `build` draws its own with other seeds."""
GRAPH = {"degree": 2, "length": 2}
"""Star graphs of the size that the base is taught."""


def of_paper() -> list[Course]:
    """What an expert answers in the paper's programs."""
    path = star_graph.build(1, 1, 1, degree=GRAPH["degree"], length=GRAPH["length"]).program.find
    judged = hover.build(1, 1, 1, split="short").program
    met = watched()
    return [
        _expert("hover.first_query", judged.first_query, met["first_query"], 0.1, 5),
        _expert("hover.summarize", judged.summarize, met["summarize"], 0.24, 2),
        _expert("hover.next_query", judged.next_query, met["next_query"], 0.14, 3),
        _expert("hover.judge", judged.judge, met["judge"], 0.12, 3),
        _expert("star_graph", path, _drawn(drawer(**GRAPH), "path"), 0.12, 4),
        _expert("codeio", codeio.build(1, 1, 1).program.predict.predict, _run("output"), 0.08, 1),
        _expert("math", math.build(1, 1, 1).program.solve.predict, _drawn(draw_math, "answer"), 0.1, 3),
        _expert("physics", physics.build(1, 1, 1).program.choose.predict, _drawn(draw_physics, "answer"), 0.1, 2),
    ]


COURSES: dict[str, Callable[[], list[Course]]] = {"reckon": of_reckon.courses, "paper": of_paper}
"""Base -> what it is taught; shares sum up to 1."""


def _expert(name: str, predictor: dspy.Predict, pool: Sequence[Inputs], share: float, problems: int) -> Course:
    """One predictor, whose right outputs are known and asked for by no more than its seed instruction."""
    skill = Skill("expert", lambda given: str(given["output"]), (predictor.signature.instructions.rstrip("."),))
    return Course(name, predictor, (skill,), lambda rng: rng.choice(pool), share, problems)


def _drawn(draw: Callable[[random.Random], dspy.Example], output: str) -> list[Inputs]:
    rng = random.Random("tiny")
    return [_with(draw(rng).toDict(), output) for _ in range(POOL)]


def _run(output: str) -> list[Inputs]:
    """CodeIO's programs; `build` draws with seeds from 0."""
    return [_with(example.toDict(), output) for example in generated(POOL, seed=-1)]


def _with(problem: Mapping[str, Any], output: str) -> Inputs:
    return {**problem, "output": problem[output]}
