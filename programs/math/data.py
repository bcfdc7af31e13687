"""Problems: templates whose answers are computed exactly, or those of Polaris."""

import math
import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import dspy

from programs.common import PublicSet

PUBLIC = PublicSet("POLARIS-Project/Polaris-Dataset-53K", revision="296f8e34132e63f4a1d70e0dcc8bddebb43f03e4")
"""Polaris, 53 thousand problems with their answers, licence Apache-2.0."""


def _linear(rng: random.Random) -> tuple[str, Fraction | str]:
    a, b, c = rng.randint(2, 12), rng.randint(1, 40), rng.randint(1, 90)
    return f"Solve {a}x + {b} = {c} for x.", Fraction(c - b, a)


def _fractions(rng: random.Random) -> tuple[str, Fraction | str]:
    a, b = Fraction(rng.randint(1, 9), rng.randint(2, 12)), Fraction(rng.randint(1, 9), rng.randint(2, 12))
    return f"Add {a} and {b} and give the sum in lowest terms.", a + b


def _series(rng: random.Random) -> tuple[str, Fraction | str]:
    first, step, count = rng.randint(1, 30), rng.randint(2, 12), rng.randint(10, 60)
    total = count * (2 * first + (count - 1) * step) // 2
    return f"The first term is {first} and each next one is larger by {step}. Sum the first {count}.", Fraction(total)


def _power(rng: random.Random) -> tuple[str, Fraction | str]:
    base, exponent, modulus = rng.randint(2, 30), rng.randint(20, 200), rng.randint(7, 60)
    text = f"What is the remainder of {base}^{{{exponent}}} on division by {modulus}?"
    return text, Fraction(pow(base, exponent, modulus))


def _multiple(rng: random.Random) -> tuple[str, Fraction | str]:
    a, b = rng.randint(12, 90), rng.randint(12, 90)
    return f"Find the least common multiple of {a} and {b}.", Fraction(math.lcm(a, b))


def _squares(rng: random.Random) -> tuple[str, Fraction | str]:
    p, q = rng.randint(-15, 15), rng.randint(-15, 15)
    text = f"The roots of x^2 + ({-p - q})x + ({p * q}) = 0 are p and q. Find p^2 + q^2."
    return text, Fraction(p * p + q * q)


def _balls(rng: random.Random) -> tuple[str, Fraction | str]:
    red, blue = rng.randint(2, 12), rng.randint(2, 12)
    text = f"An urn holds {red} red and {blue} blue balls. Two are drawn at once. How likely is it that both are red?"
    return text, Fraction(math.comb(red, 2), math.comb(red + blue, 2))


def _diagonal(rng: random.Random) -> tuple[str, Fraction | str]:
    a, b = rng.randint(1, 30), rng.randint(1, 30)
    return f"How long is the diagonal of a rectangle with sides {a} and {b}? Answer exactly.", _root(a * a + b * b)


def _root(square: int) -> str:
    """A square root in lowest terms, in LaTeX."""
    outside = max(k for k in range(1, math.isqrt(square) + 1) if square % (k * k) == 0)
    inside = square // (outside * outside)
    if inside == 1:
        return str(outside)
    return rf"{'' if outside == 1 else outside}\sqrt{{{inside}}}"


TEMPLATES: list[Callable[[random.Random], tuple[str, Fraction | str]]] = [
    _linear,
    _fractions,
    _series,
    _power,
    _multiple,
    _squares,
    _balls,
    _diagonal,
]


def draw(rng: random.Random) -> dspy.Example:
    """One problem of a random template: {problem} -> answer."""
    problem, answer = rng.choice(TEMPLATES)(rng)
    return _example(problem, str(answer))


def public_example(row: Mapping[str, Any]) -> dspy.Example | None:
    """A row with an answer; None for one without."""
    answer = str(row["answer"]).strip()
    return _example(row["problem"], answer) if answer else None


def _example(problem: str, answer: str) -> dspy.Example:
    return dspy.Example(problem=problem, answer=answer).with_inputs("problem")
