"""Everyday calculations with a list of digits, ways to report a result, and the sentences that ask for them."""

import random

from programs.lab.world import draw_digits
from programs.reckon.program import Reckon, calculate
from programs.tiny.skills import Course, Inputs, Skill


def _digits(inputs: Inputs) -> list[str]:
    return str(inputs["numbers"]).split()


PLANS = (
    Skill(
        "ends",
        lambda given: f"{_digits(given)[0]} + {_digits(given)[-1]}",
        ("add the first and the last number", "sum the two ends", "add the outer numbers"),
    ),
    Skill(
        "inner",
        lambda given: " + ".join(_digits(given)[1:-1]),
        ("add the inner numbers", "sum the middle", "add all but the two ends"),
    ),
    Skill(
        "all",
        lambda given: " + ".join(_digits(given)),
        ("add all numbers", "sum the whole list", "write the total"),
        guessed=2.0,
    ),
    Skill(
        "first_two",
        lambda given: " + ".join(_digits(given)[:2]),
        ("add the first two numbers", "sum the two at the start"),
        guessed=2.0,
    ),
    Skill(
        "last_two",
        lambda given: " + ".join(_digits(given)[-2:]),
        ("add the last two numbers", "sum the two at the end"),
    ),
    Skill(
        "times_ends",
        lambda given: f"{_digits(given)[0]} * {_digits(given)[-1]}",
        ("multiply the first and the last number", "take the product of the two ends", "multiply the outer numbers"),
    ),
    Skill(
        "times_last_two",
        lambda given: " * ".join(_digits(given)[-2:]),
        ("multiply the last two numbers", "take the product of the two at the end"),
    ),
    Skill(
        "minus",
        lambda given: f"{_digits(given)[0]} - {_digits(given)[-1]}",
        ("subtract the last number from the first", "take the last number away from the first"),
    ),
)
REPORTS = (
    Skill("plain", lambda given: given["result"], ("write only the result", "repeat the result"), guessed=3.0),
    Skill("twice", lambda given: f"{given['result']} {given['result']}", ("write the result twice", "double it")),
    Skill(
        "then_first",
        lambda given: f"{given['result']} {_digits(given)[0]}",
        ("write the result, then the first number", "put the first number after the result"),
    ),
    Skill(
        "then_last",
        lambda given: f"{given['result']} {_digits(given)[-1]}",
        ("write the result, then the last number", "put the last number after the result", "end with the last number"),
    ),
    Skill(
        "first_then",
        lambda given: f"{_digits(given)[0]} {given['result']}",
        ("write the first number, then the result", "put the first number before the result"),
    ),
    Skill(
        "last_then",
        lambda given: f"{_digits(given)[-1]} {given['result']}",
        ("write the last number, then the result", "put the last number before the result"),
    ),
)


def _draw(rng: random.Random) -> Inputs:
    numbers = draw_digits(rng)
    return {"numbers": numbers, "result": calculate(rng.choice(PLANS).act({"numbers": numbers}))}


def courses() -> list[Course]:
    """What the base is taught of this program."""
    program = Reckon()
    return [
        Course("reckon.plan", program.plan, PLANS, _draw, share=0.6, problems=8),
        Course("reckon.report", program.report, REPORTS, _draw, share=0.4, problems=8),
    ]
