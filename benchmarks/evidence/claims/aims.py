"""What was to be shown, beside the paper's figures and ours; each verdict follows from the lines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from benchmarks.evidence.claims.ceiling import AT_THE_BOUND, fitted_ceiling, interval
from benchmarks.evidence.claims.continual import ends, worst_shares
from benchmarks.evidence.claims.drift import OWN, of_rl
from benchmarks.evidence.claims.efficiency import reached
from benchmarks.evidence.claims.plasticity import learnt
from benchmarks.evidence.places import BY_LENGTH, CEILING, HARD, NEAR_ZERO, PAIRS, WEAKER, WORLD
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


class Told(NamedTuple):
    """What the lines say of an aim at one place."""

    words: str
    """Our figures, e.g. "RL's over FST's: 1.1 (never to 1.9)"."""
    met: bool
    figure: float | None = None
    """The figure that decides, e.g. 1.1; None where no single one does."""


@dataclass(frozen=True)
class Aim:
    """One row: what is aimed at, what the paper reports, how ours follows from the lines."""

    words: str
    paper: str
    of: Callable[[Sequence[Result]], Told]
    where: str = ""
    """Which of several places it is read at, e.g. "the main world"."""
    figure: str = ""
    """What the deciding figure is, e.g. "RL's over FST's"."""


def saved(results: Sequence[Result], of: Callable[[Result], Points], world: str, base: str, at_least: float) -> Told:
    """RL's cost of its own peak over FST's."""
    arms = by_arm(results, world, base)
    need(arms, "rl", "fst")
    need_peak(arms)
    found = ratios(arms, "fst", partial(reached, of))
    ratio = middle(found, never=0.0)
    return Told(f"RL's over FST's: {shown(found, '.1f', never=0.0)}", ratio >= at_least, ratio)


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
    words = f"{words}, gepa_long {shown(gepa)}" + ("" if known else "; 1.00 is the fit's bound")
    return Told(words, above, tops["fst"] - tops["rl"] if known else None)


def drift(results: Sequence[Result], world: str, base: str, at_most: float) -> Told:
    """KL of a rollout under the arm's own prompts, where accuracy first is 0.9 of RL's peak."""
    arms = by_arm(results, world, base)
    need(arms, "rl", "fst")
    need_peak(arms)
    found = of_rl(arms, "fst", OWN)
    return Told(f"{shown(found)} of RL's", middle(found) <= at_most, middle(found))


def plasticity(results: Sequence[Result], world: str) -> Told:
    """Accuracy on a second task."""
    after = learnt(results, world)
    need(after, "the base", "fst", "rl")
    words = ", ".join(f"from {arm} {shown(after[arm])}" for arm in ("the base", "fst", "rl"))
    base, fst, rl = (middle(after[arm]) for arm in ("the base", "fst", "rl"))
    return Told(words, fst >= base > rl, fst / base)


def continual(results: Sequence[Result], at_least: float) -> Told:
    """The worst of three stages beside the best that any arm came to there."""
    if not any(result["carry"] for result in results):
        raise Lacking("no runs that go on")
    shares = worst_shares(ends(results))
    words = ", ".join(f"{arm} {shares[arm]:.2f}" for arm in ("fst", "rl"))
    return Told(words, shares["fst"] >= at_least > shares["rl"], shares["fst"])


def first_signal(results: Sequence[Result], at_least: float) -> Told:
    """Updates to a first signal where the base gets nothing right."""
    arms = by_arm(results, NEAR_ZERO)
    need(arms, "rl", "fst")
    found = {arm: [first_at(curve(run), SIGNAL) for run in arms[arm].values()] for arm in ("fst", "rl")}
    words = ", ".join(f"{arm} {shown(updates, '.1f')}" for arm, updates in found.items())
    return Told(words, middle(found["rl"]) >= at_least * max(middle(found["fst"]), 1.0))


NOT_MADE = "not made yet"
PLACES = {
    "the main world": (WORLD, "base"),
    "from a base that was pretrained less": (WORLD, WEAKER),
    "an operation that is hard for this size": (HARD, "base"),
    "nobody can get more than about 0.8": (CEILING, "base"),
    "problems need different advice": (BY_LENGTH, "base"),
}
"""Where an aim is read: all that the arms were compared on, but for the world on which RL gets no reward."""


def everywhere(words: str, paper: str, figure: str, of: Callable[..., Told]) -> list[Aim]:
    """The aim at each place."""
    return [Aim(words, paper, partial(of, world=w, base=b), where, figure) for where, (w, b) in PLACES.items()]


RATIO = "RL's over FST's"
AIMS = (
    *everywhere("a third of the steps to RL's peak", "1.4 to 3.0", RATIO, partial(saved, of=curve, at_least=3)),
    *everywhere("half of all rollouts", "-", RATIO, partial(saved, of=spent, at_least=2)),
    *everywhere("a higher ceiling", "CodeIO 47.4 against 43.0", "FST's fit less RL's", ceiling),
    Aim("a first signal in a fifth of the updates", "50 against 250 to 300", partial(first_signal, at_least=5)),
    *everywhere("KL at matched reward at most 0.3 of RL's", "0.3", "FST's over RL's", partial(drift, at_most=0.3)),
    *(
        Aim(
            "a second task as from the base, while RL's falls short",
            "RL collapses, FST as the base",
            partial(plasticity, world=second),
            f"{first}, {second}",
            "FST's over the base's",
        )
        for first, second in PAIRS
    ),
    Aim("each of three stages at 0.95 of the best", "RL stalls in the second", partial(continual, at_least=0.95)),
)


def rows(results: Sequence[Result], world: str = "all", base: str = "base") -> str:
    """`world`: "all", or one; then only the aims that its lines can tell of are shown."""
    body = [[*_names(place), *_row(aim, results)] for place, aim in enumerate(AIMS)]
    return table(["aim", "the paper", "here", "met"], [row for row in body if world == "all" or row[2] != NOT_MADE])


def _names(place: int) -> tuple[str, str]:
    """How an aim's row begins: the words of an aim that is read at several places are said once."""
    aim = AIMS[place]
    if place and AIMS[place - 1].words == aim.words:
        return f"... {aim.where}", ""
    return (f"{aim.words}: {aim.where}" if aim.where else aim.words), aim.paper


def _row(aim: Aim, results: Sequence[Result]) -> list[str]:
    try:
        told = aim.of(results)
    except NoPeak as lack:
        return [str(lack), "-"]
    except Lacking as lack:
        return [NOT_MADE, str(lack)]
    return [told.words, "yes" if told.met else "no"]
