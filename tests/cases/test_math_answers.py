"""programs/math: an answer is right or wrong whatever stands round it."""

import dspy
import pytest

from programs.math.program import metric

RIGHT = [
    ("42", "42."),
    ("1/2", "1/2."),
    ("42", "$42$."),
    ("42", r"\boxed{42}."),
    ("42", "42 cm"),
    ("42", "The answer is 42."),
    ("42", "So, the answer is: 42."),
    ("42", "Answer: **42**."),
    ("42", "**42.**"),
    ("42", "**Answer: 42.**"),
    ("1/2", r"\frac{1}{2}."),
    ("1/2", "0.5."),
    ("42", "42.0."),
    ("42", r"\(42\)."),
    ("42", "x = 42."),
    ("42", '"42."'),
    ("42", "42°"),
    ("42", "42 dollars."),
    ("42", r"42^\circ"),
    ("42", r"$42^{\circ}$."),
    ("1000", "1,000."),
    ("42", r"\boxed{42}, I think."),
    ("1/2", "1 / 2."),
    ("1/2", "\x0crac{1}{2}"),
    ("42", "\x08oxed{42}"),
    ("-3", "\N{MINUS SIGN}3."),
    ("-3", "The answer is \N{MINUS SIGN}3."),
    (r"2\sqrt{3}", r"2\sqrt{3}."),
    ("42", "84/2."),
    ("42", "$42.$"),
    ("42", r"\boxed{42.}"),
    ("1/2", r"\boxed{\frac{1}{2}}."),
    ("x+1", "x+1."),
    ("42", r"\text{42.}"),
    ("42", "42.000."),
    ("5", r"So it is $\boxed{5}$."),
    ("42", r"The final answer is $\boxed{42}$."),
    (r"\{1,2\}", r"\{2,1\}."),
]
WRONG = [
    ("42", "42!"),
    ("42", "42.5"),
    ("5", "4, 5."),
    ("5", "5, 4."),
    ("42", "42 or 43"),
    ("42", "43 not 42."),
    ("1/3", "0.333..."),
    ("4", "."),
    ("42", "43."),
    ("1/2", "2/1."),
    ("4", "42."),
    ("42", ".42"),
    ("42", "-42."),
    ("5", "2+3."),
    ("5", "The answer is 2+3."),
    ("42", "The answer is not 42."),
    ("42", "It is 4, 42."),
    ("42", "The answer is 43."),
    ("5", "5 million"),
]


def score(want, got):
    return metric(dspy.Example(answer=want), dspy.Prediction(answer=got)).score


@pytest.mark.parametrize(("want", "got"), RIGHT)
def test_what_stands_round_a_right_answer_takes_nothing_from_it(want, got):
    assert score(want, got) == 1.0


@pytest.mark.parametrize(("want", "got"), WRONG)
def test_what_is_taken_away_makes_no_wrong_answer_right(want, got):
    assert score(want, got) == 0.0
