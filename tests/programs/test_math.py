"""Math: the comparison of results, in worker threads too, and the templates."""

import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import dspy
import pytest
from dspy.utils import DummyLM

from programs.math import build
from programs.math.data import TEMPLATES, public_example
from programs.math.program import metric
from programs.math.verifier import Verifier

TOWER = r"\boxed{9^{9^{9^9}}}"
"""Computes for ever, in C code that no signal handler of Python interrupts."""


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    verifier = Verifier(timeout_s=3.0)
    assert verifier.same("1", "1.0")
    return verifier


def judged(want: str, got: str) -> tuple[float, str]:
    verdict = metric(dspy.Example(answer=want), dspy.Prediction(answer=got))
    return verdict.score, verdict.feedback


@pytest.mark.parametrize(
    ("want", "got"),
    [
        ("5", "5"),
        ("5", r"\boxed{5}"),
        ("5", r"So it is $\boxed{5}$."),
        ("5", "x = 5"),
        ("5", "**5**"),
        ("7/12", r"\frac{7}{12}"),
        ("1/2", "0.5"),
        ("-3", "\N{MINUS SIGN}3"),
        ("1000", "1,000"),
        (r"2\sqrt{3}", r"\sqrt{12}"),
        (r"2\sqrt{3}", "2*sqrt(3)"),
        ("x+1", "1+x"),
        (r"\{1,2\}", r"\{2,1\}"),
    ],
)
def test_an_equal_result_scores_however_it_is_written(want: str, got: str) -> None:
    assert judged(want, got) == (1.0, "Correct.")


@pytest.mark.parametrize(
    ("want", "got", "fault"),
    [
        ("5", "6", "The answer is 6. Expected 5."),
        ("5", "", "There is no answer. Expected 5."),
        ("7/12", "0.58", "Expected 7/12"),
        ("5", "4, 5", "Expected 5"),
        ("5", "}{", "Expected 5"),
        ("5", "2+3", "is not worked out. Expected 5."),
        ("1024", "2^{10}", "is not worked out"),
        ("6", r"2 \times 3", "is not worked out"),
        ("5", "8 - 3", "is not worked out"),
        ("5", "5" * 5000, "Expected 5"),
        ("x+1", "x+2", r"Expected x+1"),
    ],
)
def test_feedback_says_what_was_expected(want: str, got: str, fault: str) -> None:
    score, feedback = judged(want, got)
    assert score == 0.0
    assert fault in feedback


def test_worker_threads_get_the_same_answers() -> None:
    pairs = [("1/2", "0.5"), ("1/2", "0.4"), (r"\sqrt{8}", r"2\sqrt{2}")] * 10
    with ThreadPoolExecutor(8) as pool:
        scores = list(pool.map(lambda pair: judged(*pair)[0], pairs))
    assert scores == [1.0, 0.0, 1.0] * 10


@pytest.mark.slow
def test_a_reply_that_computes_for_ever_is_given_up_and_stops_no_other_thread(verifier: Verifier) -> None:
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.05):
            ticks.append(time.monotonic())

    clock = threading.Thread(target=tick)
    clock.start()
    start = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(verifier.same, "5", TOWER).result(timeout=60)
    took = time.monotonic() - start
    done.set()
    clock.join()
    assert answer is None
    assert took < 30
    assert max(b - a for a, b in pairwise(ticks)) < took / 2
    assert verifier.same("5", "5.0") is True  # a new child


def test_a_child_that_was_killed_is_replaced(verifier: Verifier) -> None:
    assert verifier.same("1/3", "2/6")
    assert verifier._child is not None
    verifier._child.kill()
    verifier._child.wait(timeout=10)
    assert verifier.same("1/3", "2/6") is True


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_templates_answer_is_exact_and_is_its_own_right_answer(template) -> None:
    rng = random.Random(1)
    for _ in range(20):
        problem, answer = template(rng)
        assert problem
        assert judged(str(answer), rf"\boxed{{{answer}}}") == (1.0, "Correct.")


def test_some_answers_are_what_they_should_be() -> None:
    task = build(train=400, val=1, test=1)
    for gold in task.trainset:
        if gold.problem.startswith("Solve"):
            a, b, c = map(int, re.findall(r"\d+", gold.problem))
            numerator, _, denominator = gold.answer.partition("/")
            assert a * int(numerator) + b * int(denominator or 1) == c * int(denominator or 1)
        if gold.problem.startswith("How long is the diagonal"):
            outside, _, inside = gold.answer.partition(r"\sqrt")
            a, b = map(int, re.findall(r"\d+", gold.problem))
            assert int(outside or 1) ** 2 * int(inside.strip("{}") or 1) == a * a + b * b


def test_an_oracle_solves_the_offline_set_through_the_program() -> None:
    task = build(train=1, val=1, test=30)
    replies = {
        gold.problem: {"reasoning": "It is known.", "answer": rf"\boxed{{{gold.answer}}}"} for gold in task.testset
    }
    with dspy.context(lm=DummyLM(replies)):
        assert [metric(gold, task.program(**gold.inputs())).score for gold in task.testset] == [1.0] * 30


def test_a_public_row_without_an_answer_is_left_out() -> None:
    example = public_example({"problem": "1+1?", "answer": " 2 ", "difficulty": "3/8"})
    assert example is not None
    assert (example.problem, example.answer) == ("1+1?", "2")
    assert public_example({"problem": "1+1?", "answer": "", "difficulty": "0/8"}) is None
