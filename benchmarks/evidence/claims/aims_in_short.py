"""The aims in ten lines: what is aimed at, in how many places it is met, and in which."""

from collections.abc import Sequence
from itertools import groupby

from benchmarks.evidence.claims.aims import AIMS, NOT_MADE, Aim, Told
from benchmarks.evidence.raw import Lacking, Result
from benchmarks.readme import table


def rows(results: Sequence[Result], world: str = "all", base: str = "base") -> str:
    """A line for each aim, and one for all."""
    told = [(aim, _told(aim, results)) for aim in AIMS]
    body = [_line(words, list(group)) for words, group in groupby(told, lambda pair: pair[0].words)]
    return table(["aim", "the paper", "here", "met", "where"], [*body, ["all", "", "", _met(told), ""]])


def _told(aim: Aim, results: Sequence[Result]) -> Told:
    try:
        return aim.of(results)
    except Lacking:
        return Told(NOT_MADE, False)


def _line(words: str, told: Sequence[tuple[Aim, Told]]) -> list[str]:
    aim = told[0][0]
    figures = [found.figure for _, found in told if found.figure is not None]
    here = f"{aim.figure}: {min(figures):.2f} to {max(figures):.2f}" if aim.figure and figures else told[0][1].words
    return [words, aim.paper, here, _met(told), "; ".join(one.where for one, found in told if found.met)]


def _met(told: Sequence[tuple[Aim, Told]]) -> str:
    return f"{sum(found.met for _, found in told)} of {len(told)}"
