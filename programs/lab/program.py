"""`build`: the program, the metric and the problems of one world, ready for an optimizer."""

import random
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy

from programs.lab.tokenizer import signature
from programs.lab.world import World, load_world

BASE = Path(__file__).parent / "base"
"""Folder of the base model that ships with the lab (see `pretrain`)."""


class Solve(dspy.Module):
    """One predictor: numbers -> answer."""

    def __init__(self, instruction: str) -> None:
        super().__init__()
        self.solve = dspy.Predict(signature(instruction))

    def forward(self, numbers: str) -> dspy.Prediction:
        return self.solve(numbers=numbers)

    async def aforward(self, numbers: str) -> dspy.Prediction:
        return await self.solve.acall(numbers=numbers)


@dataclass(frozen=True)
class Metric:
    """GEPA's metric for a world: score 1.0 if the answer is right, else 0.0, and the world's feedback."""

    world: World
    vague: float = 0.5
    """Share of the problems whose feedback hides the expected answer; which ones is fixed by the problem's text."""

    def __call__(
        self, gold: Any, pred: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None
    ) -> dspy.Prediction:
        got = " ".join(str(pred.answer).split())
        shows_answer = zlib.crc32(gold.numbers.encode()) % 100 >= 100 * self.vague
        feedback = self.world.feedback(gold.answer, got, shows_answer)
        return dspy.Prediction(score=float(got == gold.answer), feedback=feedback)


@dataclass(frozen=True)
class Lab:
    """One world, ready to be learnt."""

    program: Solve
    """Starts with the world's seed instruction; has no LM yet."""
    metric: Metric
    trainset: list[dspy.Example]
    """Examples {numbers, answer} with input `numbers`; the three sets share no problem."""
    valset: list[dspy.Example]
    testset: list[dspy.Example]
    world: World


def build(
    world: str | World = "reverse_drop",
    seed: int = 0,
    *,
    train: int = 512,
    val: int = 64,
    test: int = 128,
    vague: float = 0.5,
) -> Lab:
    """Draw `train` + `val` + `test` different problems of a world and set up its program and metric.

    `world` is a short name, an import path ("my_pkg.my_world:WORLD") or a World.
    """
    chosen = world if isinstance(world, World) else load_world(world)
    examples = _draw(chosen, random.Random(f"{chosen.name}-{seed}"), train + val + test)
    return Lab(
        program=Solve(chosen.seed_instruction),
        metric=Metric(chosen, vague),
        trainset=examples[:train],
        valset=examples[train : train + val],
        testset=examples[train + val :],
        world=chosen,
    )


def _draw(world: World, rng: random.Random, count: int) -> list[dspy.Example]:
    problems: dict[str, None] = {}  # a dict keeps the order of the draws
    for _ in range(100 * count):
        if len(problems) < count:
            problems[world.draw(rng)] = None
    if len(problems) < count:
        raise ValueError(f"world {world.name!r} has only {len(problems)} different problems; {count} were asked for")
    return [dspy.Example(numbers=text, answer=world.answer(text)).with_inputs("numbers") for text in problems]
