"""Reads HoVer's feedback for `SkillProposer`: which query, which notes and which verdict it asks for."""

import re
from collections.abc import Mapping
from typing import Any

from programs.hover.data import NOT_SUPPORTED, SUPPORTED
from programs.hover.skills import SKILLS
from programs.tiny.proposer import Fits, SkillProposer


def proposer(seed: int = 0) -> SkillProposer:
    """How much the feedback gives away: the titles that a query should have found are named in it, as are those that
    the notes leave out, and the right verdict. Which words of claim and notes lead there is left to be guessed."""
    readers = {"first_query": _query, "next_query": _query, "summarize": _notes, "judge": _verdict}
    return SkillProposer(SKILLS, readers, seed)


def _query(inputs: Mapping[str, Any], got: str, feedback: str) -> Fits | None:
    missed = _titles(r"and missed (.+?)\.(?= The query|$)", feedback)
    found = _titles(r"found (.+?) and missed", feedback)
    given = f"{inputs['claim']} {inputs.get('notes', '')}".lower()
    wanted = [title for title in missed if title in given] or [title for title in found if title in given]
    return (lambda query: any(title in query for title in wanted)) if wanted else None


def _notes(inputs: Mapping[str, Any], got: str, feedback: str) -> Fits | None:
    given = f"{inputs['notes']} {inputs['passages']}".lower()
    wanted = [title for title in _titles(r"do not mention (.+?), which a search", feedback) if title in given]
    if wanted:
        return lambda notes: all(title in notes for title in wanted)
    return None


def _verdict(inputs: Mapping[str, Any], got: str, feedback: str) -> Fits | None:
    if "is right" in feedback or feedback.startswith("Correct"):
        return lambda verdict: verdict == got.lower()
    if "is wrong" in feedback:
        right = NOT_SUPPORTED if got == SUPPORTED else SUPPORTED
        return lambda verdict: verdict == right
    return None


def _titles(pattern: str, feedback: str) -> list[str]:
    listed = ", ".join(re.findall(pattern, feedback)).lower().split(", ")
    return [title for title in listed if title not in ("", "nothing")]
