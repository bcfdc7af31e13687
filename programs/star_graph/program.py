"""The program, one predictor, and the metric that walks along the answer."""

import re
from itertools import pairwise
from typing import Any

import dspy

from programs.common import judged, said


class Path(dspy.Signature):
    """Find the path from the source to the goal."""

    edges: str = dspy.InputField(desc="directed edges, such as 4>17")
    source: str = dspy.InputField()
    goal: str = dspy.InputField()
    path: str = dspy.OutputField(desc="the nodes from source to goal, separated by spaces")


class FindPath(dspy.Module):
    """One predictor: edges, source, goal -> path."""

    def __init__(self) -> None:
        super().__init__()
        self.find = dspy.Predict(Path)

    def forward(self, edges: str, source: str, goal: str) -> dspy.Prediction:
        return self.find(edges=edges, source=source, goal=goal)


def metric(
    gold: Any, pred: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None
) -> dspy.Prediction:
    """1 for the path from source to goal, else 0 and the first place where the answer leaves the graph."""
    nodes = re.findall(r"\d+", said(pred, "path"))
    return judged(fault(gold.edges, gold.source, gold.goal, nodes))


def fault(edges: str, source: str, goal: str, nodes: list[str]) -> str | None:
    """Where a path goes wrong, as a sentence; None for the right one."""
    if not nodes:
        return "The path names no node."
    if nodes[0] != source:
        return f"The path starts at {nodes[0]}; the source is {source}."
    known = {tuple(edge.split(">")) for edge in edges.split()}
    for step, (a, b) in enumerate(pairwise(nodes), start=1):
        if (a, b) not in known:
            onward = sorted((end for start, end in known if start == a), key=int)
            exits = f"its edges lead to {', '.join(onward)}" if onward else "no edge leads on from there"
            return f"Step {step} goes from {a} to {b}, and there is no such edge: {exits}."
    if nodes[-1] == goal:
        return None
    if goal in nodes:
        return f"The path goes on after the goal {goal}."
    if any(start == nodes[-1] for start, _ in known):
        return f"The path stops at {nodes[-1]} before it reaches the goal {goal}."
    return f"The arm that begins with {nodes[1]} ends at {nodes[-1]}, not at the goal {goal}."
