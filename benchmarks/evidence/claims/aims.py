"""What was to be shown, beside the paper's figures and ours; each verdict follows from the lines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.evidence.claims.ceiling import AT_THE_BOUND, fitted_ceiling, interval
from benchmarks.evidence.claims.continual import ends, worst_shares
from benchmarks.evidence.claims.drift import OWN, of_rl
from benchmarks.evidence.claims.efficiency import reached
from benchmarks.evidence.claims.plasticity import learnt
from benchmarks.evidence.places import BY_LENGTH, CEILING, HARD, NEAR_ZERO, WEAKER, WORLD
from benchmarks.evidence.raw import (
    SIGNAL,
    Lacking,
    NoPeak,
    Result,
    by_arm,
    curve,
    final,
    first_at,
    middle,
    need,
    need_peak,
    ratios,
    shown,
    spent,
)
from benchmarks.readme import table

Points = list[tuple[float, float]]
Told = tuple[str, bool]
"""Our figures in words, and whether the aim is met."""


@dataclass(frozen=True)
class Aim:
    """One row: what is aimed at, what the paper reports, how ours follows from the lines."""

    words: str
    paper: str
    of: Callable[[Sequence[Result]], Told]


def saved(results: Sequence[Result], of: Callable[[Result], Points], world: str, base: str, at_least: float) -> Told:
    """RL's cost of its own peak over FST's."""
    arms = by_arm(results, world, base)
    need(arms, "rl", "fst")
    need_peak(arms)
    found = ratios(arms, "fst", partial(reached, of))
    return f"RL's over FST's: {shown(found, '.1f', never=0.0)}", middle(found, never=0.0) >= at_least


def ceiling(results: Sequence[Result], world: str, base: str) -> Told:
    """Fitted for the arms that train, of a search its end; above when the intervals do not meet.

    A fit that comes to its bound of 1 has found no ceiling: the curve was still rising.
    """
    arms = by_arm(results, world, base)
    need(arms, "fst", "rl", "gepa_long")
    runs = {arm: list(arms[arm].values()) for arm in ("fst", "rl")}
    tops = {arm: fitted_ceiling(of) for arm, of in runs.items()}
    ranges = {arm: interval(of) for arm, of in runs.items()}
    gepa = [final(run) for run in arms["gepa_long"].values()]
    words = ", ".join(f"{arm} {tops[arm]:.2f} ({low:.2f} to {high:.2f})" for arm, (low, high) in ranges.items())
    known = max(tops.values()) < AT_THE_BOUND
    above = known and ranges["fst"][0] > max(ranges["rl"][1], middle(gepa))
    return f"{words}, gepa_long {shown(gepa)}" + ("" if known else "; 1.00 is the fit's bound"), above


def drift(results: Sequence[Result], world: str, base: str, at_most: float) -> Told:
    """KL of a rollout under the arm's own prompts, where accuracy first is 0.9 of RL's peak."""
    arms = by_arm(results, world, base)
    need(arms, "rl", "fst")
    need_peak(arms)
    found = of_rl(arms, "fst", OWN)
    return f"{shown(found)} of RL's", middle(found) <= at_most


def plasticity(results: Sequence[Result], world: str) -> Told:
    """Accuracy on a second task."""
    after = learnt(results, world)
    need(after, "the base", "fst", "rl")
    words = ", ".join(f"from {arm} {shown(after[arm])}" for arm in ("the base", "fst", "rl"))
    base, fst, rl = (middle(after[arm]) for arm in ("the base", "fst", "rl"))
    return words, fst >= base > rl


def continual(results: Sequence[Result], at_least: float) -> Told:
    """The worst of three stages beside the best that any arm came to there."""
    if not any(result["carry"] for result in results):
        raise Lacking("no runs that go on")
    shares = worst_shares(ends(results))
    words = ", ".join(f"{arm} {shares[arm]:.2f}" for arm in ("fst", "rl"))
    return words, shares["fst"] >= at_least > shares["rl"]


def first_signal(results: Sequence[Result], at_least: float) -> Told:
    """Updates to a first signal where the base gets nothing right."""
    arms = by_arm(results, NEAR_ZERO)
    need(arms, "rl", "fst")
    found = {arm: [first_at(curve(run), SIGNAL) for run in arms[arm].values()] for arm in ("fst", "rl")}
    words = ", ".join(f"{arm} {shown(updates, '.1f')}" for arm, updates in found.items())
    return words, middle(found["rl"]) >= at_least * max(middle(found["fst"]), 1.0)


NOT_MADE = "not made yet"
PLACES = {
    "the main world": (WORLD, "base"),
    "from a base that was pretrained less": (WORLD, WEAKER),
    "an operation that is hard for this size": (HARD, "base"),
    "nobody can get more than about 0.8": (CEILING, "base"),
    "problems need different advice": (BY_LENGTH, "base"),
}
"""Where an aim is read: all that the arms were compared on, but for the world on which RL gets no reward."""


def everywhere(words: str, paper: str, of: Callable[..., Told]) -> list[Aim]:
    """The aim at each place."""
    return [
        Aim(f"{words}: {where}" if not place else f"... {where}", "" if place else paper, partial(of, world=w, base=b))
        for place, (where, (w, b)) in enumerate(PLACES.items())
    ]


AIMS = (
    *everywhere("a third of the steps to RL's peak", "1.4 to 3.0", partial(saved, of=curve, at_least=3)),
    *everywhere("half of all rollouts", "-", partial(saved, of=spent, at_least=2)),
    *everywhere("a higher ceiling", "CodeIO 47.4 against 43.0", ceiling),
    Aim("a first signal in a fifth of the updates", "50 against 250 to 300", partial(first_signal, at_least=5)),
    *everywhere("KL at matched reward at most 0.3 of RL's", "0.3", partial(drift, at_most=0.3)),
    Aim(
        "a second task as from the base, while RL's falls short: reverse_drop, descending",
        "RL collapses, FST as the base",
        partial(plasticity, world=HARD),
    ),
    Aim("... descending, reverse_drop", "", partial(plasticity, world=WORLD)),
    Aim("each of three stages at 0.95 of the best", "RL stalls in the second", partial(continual, at_least=0.95)),
)


def rows(results: Sequence[Result], world: str = "all", base: str = "base") -> str:
    """`world`: "all", or one; then only the aims that its lines can tell of are shown."""
    body = [[aim.words, aim.paper, *_row(aim, results)] for aim in AIMS]
    return table(["aim", "the paper", "here", "met"], [row for row in body if world == "all" or row[2] != NOT_MADE])


def _row(aim: Aim, results: Sequence[Result]) -> list[str]:
    try:
        words, met = aim.of(results)
    except NoPeak as lack:
        return [str(lack), "-"]
    except Lacking as lack:
        return [NOT_MADE, str(lack)]
    return [words, "yes" if met else "no"]
