"""Reads Reckon's feedback for `SkillProposer`: which value, and which report of it, it asks for."""

import re
from collections.abc import Mapping
from typing import Any

from programs.reckon.program import calculate
from programs.reckon.skills import PLANS, REPORTS
from programs.tiny.proposer import Fits, SkillProposer


def proposer(seed: int = 0) -> SkillProposer:
    """How much the feedback gives away: for half of the problems the value that the calculation should have, or the
    answer that should have been made of the result; for the others whether it is too small or too large, too short or
    too long."""
    return SkillProposer({"plan": PLANS, "report": REPORTS}, {"plan": _plan, "report": _report}, seed)


def _plan(inputs: Mapping[str, Any], got: str, feedback: str) -> Fits | None:
    value = calculate(got)
    if shown := re.search(r"should come to (-?\d+)", feedback):
        return lambda plan: calculate(plan) == shown[1]
    if "calculation is right" in feedback:
        return lambda plan: calculate(plan) == value
    if "too small" in feedback:
        return lambda plan: int(calculate(plan)) > int(value)
    if "too large" in feedback:
        return lambda plan: int(calculate(plan)) < int(value)
    return None


def _report(inputs: Mapping[str, Any], got: str, feedback: str) -> Fits | None:
    if shown := re.search(r"should be ([-\d ]+);", feedback):
        return lambda answer: answer == shown[1]
    if "answer is right" in feedback:
        return lambda answer: answer.split() == got.split()
    if "too few" in feedback:
        return lambda answer: len(answer.split()) > len(got.split())
    if "too many" in feedback:
        return lambda answer: len(answer.split()) < len(got.split())
    if "a wrong number" in feedback:
        return lambda answer: len(answer.split()) == len(got.split()) and answer.split() != got.split()
    return None
