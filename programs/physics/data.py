"""Questions: formulae with numbers and the results of usual mistakes, or SciKnowEval's multiple choice in physics."""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import dspy

from programs.common import PublicSet

PUBLIC = PublicSet("hicai-zju/SciKnowEval", revision="92ef969ad0a8bd6e195e0ac18af2c46e307e0cc2", config="v2")
"""SciKnowEval, version 2, licence MIT."""

LETTERS = "ABCD"


@dataclass(frozen=True)
class Formula:
    """One kind of question about two quantities."""

    question: str
    """With {a} and {b}."""
    result: Callable[[float, float], float]
    mistakes: tuple[Callable[[float, float], float], ...]
    """At least three: a forgotten square, a wrong factor, a quotient turned round."""
    unit: str


FORMULAE = [
    Formula(
        "A body of {a} kg moves at {b} m/s. What is its kinetic energy?",
        lambda m, v: m * v * v / 2,
        (lambda m, v: m * v * v, lambda m, v: m * v / 2, lambda m, v: m * m * v / 2, lambda m, v: m * v),
        "J",
    ),
    Formula(
        "A stone of {b} kg falls freely from rest for {a} s (g = 9.8 m/s^2). How far does it fall?",
        lambda t, _: 9.8 * t * t / 2,
        (lambda t, _: 9.8 * t * t, lambda t, _: 9.8 * t, lambda t, _: 9.8 * t / 2, lambda t, _: 4.9 * t * t * t),
        "m",
    ),
    Formula(
        "A current of {a} A flows through a resistor of {b} ohm. What power does it give off?",
        lambda i, r: i * i * r,
        (lambda i, r: i * r, lambda i, r: i * r * r, lambda i, r: i * i / r, lambda i, r: i * i * r / 2),
        "W",
    ),
    Formula(
        "Two resistors, of {a} ohm and {b} ohm, are connected in parallel. What is their resistance together?",
        lambda p, q: p * q / (p + q),
        (lambda p, q: p + q, lambda p, q: (p + q) / 2, lambda p, q: (p + q) / (p * q), lambda p, q: p * q),
        "ohm",
    ),
    Formula(
        "A spring of {a} N/m is stretched by {b} cm. What energy does it hold?",
        lambda k, x: k * (x / 100) ** 2 / 2,
        (
            lambda k, x: k * (x / 100) ** 2,
            lambda k, x: k * x / 100,
            lambda k, x: k * x / 200,
            lambda k, x: k * x * x / 2,
        ),
        "J",
    ),
    Formula(
        "A car goes round a curve of radius {a} m at {b} m/s. What is its centripetal acceleration?",
        lambda r, v: v * v / r,
        (lambda r, v: v / r, lambda r, v: v * v / (2 * r), lambda r, v: r / v, lambda r, v: v * v * r),
        "m/s^2",
    ),
    Formula(
        "A wave has a frequency of {a} Hz and a length of {b} m. How fast does it run?",
        lambda f, w: f * w,
        (lambda f, w: f / w, lambda f, w: w / f, lambda f, w: 2 * math.pi * f * w, lambda f, w: f * w / 2),
        "m/s",
    ),
    Formula(
        "A gas at constant temperature is pressed from {a} litres at 1 bar to {b} bar. What volume is left?",
        lambda v, p: v / p,
        (lambda v, p: v * p, lambda v, p: v / (p + 1), lambda v, p: v / p**2, lambda v, p: v * (1 - 1 / p)),
        "litres",
    ),
]


def draw(rng: random.Random) -> dspy.Example:
    """One question with four different choices in random order: {question, choices} -> answer, a letter."""
    while True:
        formula, a, b = rng.choice(FORMULAE), rng.randint(2, 60), rng.randint(2, 60)
        right = _with_unit(formula.result(a, b), formula.unit)
        others = {_with_unit(mistake(a, b), formula.unit) for mistake in formula.mistakes} - {right}
        if len(others) >= len(LETTERS) - 1:
            break  # else mistakes fall together, as with 2 * 2 and 2 + 2
    texts = [right, *rng.sample(sorted(others), len(LETTERS) - 1)]
    rng.shuffle(texts)
    choices = dict(zip(LETTERS, texts, strict=True))
    return _example(formula.question.format(a=a, b=b), choices, LETTERS[texts.index(right)])


def _with_unit(value: float, unit: str) -> str:
    return f"{value:.3g} {unit}"


def public_example(row: Mapping[str, Any]) -> dspy.Example | None:
    """A multiple choice question in physics; None for any other row."""
    choices = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True)) if row.get("choices") else {}
    wanted = row["domain"] == "Physics" and row["type"].startswith("mcq") and row["answerKey"] in choices
    return _example(row["question"], choices, row["answerKey"]) if wanted else None


def _example(question: str, choices: Mapping[str, str], answer: str) -> dspy.Example:
    lines = "\n".join(f"{letter}. {' '.join(text.split())}" for letter, text in choices.items())
    return dspy.Example(question=question, choices=lines, answer=answer).with_inputs("question", "choices")
