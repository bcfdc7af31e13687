"""Star graphs: the generator, the metric's walk along an answer, the program."""

import dspy
import pytest
from dspy.utils import DummyLM

from programs.star_graph import build
from programs.star_graph.program import metric

GOLD = dspy.Example(edges="3>7 1>2 7>9 1>3 2>4 4>8", source="1", goal="9", path="1 3 7 9")


def judged(path: str) -> tuple[float, str]:
    verdict = metric(GOLD, dspy.Prediction(path=path))
    return verdict.score, verdict.feedback


@pytest.mark.parametrize("path", ["1 3 7 9", "1 -> 3 -> 7 -> 9", "[1, 3, 7, 9]", " 1>3>7>9\n"])
def test_the_path_scores_however_it_is_written(path: str) -> None:
    assert judged(path) == (1.0, "Correct.")


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("", "names no node"),
        ("3 7 9", "starts at 3; the source is 1"),
        ("1 3 9", "Step 2 goes from 3 to 9, and there is no such edge: its edges lead to 7"),
        ("1 5", "Step 1 goes from 1 to 5, and there is no such edge: its edges lead to 2, 3"),
        ("1 3 7 9 2", "Step 4 goes from 9 to 2, and there is no such edge: no edge leads on from there"),
        ("1 3 7", "stops at 7 before it reaches the goal 9"),
        ("1", "stops at 1 before it reaches the goal 9"),
        ("1 2 4 8", "The arm that begins with 2 ends at 8, not at the goal 9"),
        ("1 9", "Step 1 goes from 1 to 9"),
    ],
)
def test_feedback_says_where_a_path_goes_wrong(path: str, fault: str) -> None:
    score, feedback = judged(path)
    assert score == 0.0
    assert fault in feedback


def test_a_graph_has_its_arms_and_only_one_path() -> None:
    for gold in build(train=50, val=1, test=1, degree=4, length=6).trainset:
        edges = [tuple(edge.split(">")) for edge in gold.edges.split()]
        starts = [start for start, _ in edges]
        assert len(edges) == 24
        assert starts.count(gold.source) == 4
        assert all(starts.count(node) == 1 for node in set(starts) - {gold.source})
        assert edges != sorted(edges, key=lambda edge: starts.count(edge[0]))


def test_a_graph_that_cannot_be_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="degree=20, length=20"):
        build(degree=20, length=20)


def test_an_oracle_solves_the_offline_set_through_the_program() -> None:
    task = build(train=5, val=1, test=30)
    lm = DummyLM({gold.edges: {"path": gold.path} for gold in task.testset})
    with dspy.context(lm=lm):
        assert [metric(gold, task.program(**gold.inputs())).score for gold in task.testset] == [1.0] * 30
