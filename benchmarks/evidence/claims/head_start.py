"""How far Fast-Slow Training is ahead of RL on the way to RL's peak, in updates.

A head start that stays the same over the whole way is what a text gives to weights that then learn as fast as RL's. RL
that is told the rule from its first step says how much of a head start a text can give at most.
"""

import math
from collections.abc import Sequence

from benchmarks.evidence.claims.aims import PLACES
from benchmarks.evidence.claims.efficiency import reached
from benchmarks.evidence.places import TOLD
from benchmarks.evidence.raw import Result, Runs, by_arm, curve, peak, shown
from benchmarks.readme import table

SHARES = (0.5, 0.7, 0.8, 0.9, 1.0)


def rows(results: Sequence[Result], world: str = "all", base: str = "base") -> str:
    """By place, or only where `world` is asked: RL's updates to shares of its own peak, and how many others save."""
    body = []
    for where, (place, start) in PLACES.items():
        arms = by_arm(results, place, start)
        if world not in ("all", place) or not {"rl", "fst"} <= set(arms):
            continue
        told = by_arm(results, TOLD[place], start) if place in TOLD and start == "base" else {}
        body.append([f"{where}: RL's updates", *_updates(arms["rl"])])
        body.append(["... of which FST saves", *_saved(arms, arms["fst"])])
        body += [["... of which RL saves that is told the rule", *_saved(arms, told["rl"])]] if told else []
    return table(["", *(f"to {share:g} of RL's peak" for share in SHARES)], body)


def _updates(runs: dict[int, Result]) -> list[str]:
    found = [[reached(curve, run, share * peak(run)) for run in runs.values()] for share in SHARES]
    return [shown(values, ".1f") for values in found]


def _saved(arms: Runs, runs: dict[int, Result]) -> list[str]:
    """Seed by seed; a level that is never reached saves least of all."""
    cells = []
    for share in SHARES:
        levels = {seed: share * peak(arms["rl"][seed]) for seed in runs}
        own = {seed: reached(curve, arms["rl"][seed], level) for seed, level in levels.items()}
        its = {seed: reached(curve, run, levels[seed]) for seed, run in runs.items()}
        saved = [None if its[seed] is None else (own[seed] or 0.0) - (its[seed] or 0.0) for seed in runs]
        cells.append(shown(saved, ".1f", never=-math.inf))
    return cells
