"""Raw lines of the evidence, and the few ways in which every claim reads them.

A figure is a median over seeds; beside it stand the smallest and the largest. For three and for five seeds that is
also the 95 % percentile bootstrap of the median; it covers the true median 3 times in 4 and 15 times in 16. Arms are
compared with RL on the same seed: the same problems.
"""

import json
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.arms import ABOUT

RESULTS = Path(__file__).parent.parent / "results" / "evidence"
IDENTITY = ("arm", "world", "seed", "base", "carry")
ROLLOUTS = ("training rollouts", "search rollouts")
Result = Mapping[str, Any]
"""What `benchmarks.evidence.run` writes of one run."""
Runs = Mapping[str, Mapping[int, Result]]
"""Arm -> seed -> its run."""


SIGNAL = 0.1
"""Accuracy that counts as a first signal."""


class Lacking(Exception):
    """What a table needs is not in the lines; it says what."""


class NoPeak(Lacking):
    """RL learnt nothing: its runs are there, what others are held against is not."""


def read(form: str, experiment: str) -> list[Result]:
    """The raw lines of an experiment, or of "all" of a form, each run once; empty when it was not made yet.

    Of a run in several experiments the main one's lines are taken.

    Raises:
        ValueError: two experiments hold different results of one run.
    """
    paths = sorted((RESULTS / form).glob("*.jsonl" if experiment == "all" else f"{experiment}.jsonl"))
    paths.sort(key=lambda path: path.stem != "main")
    found: dict[tuple[Any, ...], Result] = {}
    for line in (json.loads(text) for path in paths for text in path.read_text().splitlines()):
        run = tuple(line[name] for name in IDENTITY)
        if _counted(found.setdefault(run, line)) != _counted(line):
            raise ValueError(f"{form}: two different results of {run}")
    return list(found.values())


def _counted(result: Result) -> list[dict[str, Any]]:
    """A run's lines without the KLs, whose last digits depend on the order in which a release adds numbers up."""
    return [{name: value for name, value in line.items() if " KL " not in name} for line in result["lines"]]


def by_arm(results: Sequence[Result], world: str, base: str = "base") -> dict[str, dict[int, Result]]:
    """Arm -> seed -> its run on a world from a base model, in the order of ABOUT."""
    found: dict[str, dict[int, Result]] = {arm: {} for arm in ABOUT}
    for result in results:
        if result["world"] == world and result["base"] == base:
            found.setdefault(result["arm"], {})[result["seed"]] = result
    return {arm: runs for arm, runs in found.items() if runs}


def need(arms: Collection[str], *names: str) -> None:
    """Raises:
    Lacking: an arm that a table is made of was not run.
    """
    if missing := [name for name in names if name not in arms]:
        raise Lacking(f"no runs of {', '.join(missing)}")


def need_peak(arms: Runs) -> None:
    """Raises:
    Lacking: RL was not run.
    NoPeak: its median came to no signal: nobody can be held to its peak.
    """
    need(arms, "rl")
    if middle([peak(run) for run in arms["rl"].values()]) < SIGNAL:
        raise NoPeak("RL came to no signal, so it has no peak to reach")


# ---- what a run came to ------------------------------------------------------------------------


def curve(result: Result, under: str = "evolved") -> list[tuple[float, float]]:
    """(updates, accuracy) at each measured checkpoint, under the "seed" or the "evolved" instruction."""
    return [(line["step"], line[f"{under} accuracy"]) for line in result["lines"]]


def spent(result: Result) -> list[tuple[float, float]]:
    """(all rollouts, accuracy): searches count as training does."""
    return [(all_rollouts(line), line["evolved accuracy"]) for line in result["lines"]]


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each figure's mean with its neighbours': a single checkpoint's standard error is about 0.025."""
    values = [value for _, value in points]
    return [(at, statistics.fmean(values[max(i - 1, 0) : i + 2])) for i, (at, _) in enumerate(points)]


def all_rollouts(line: Mapping[str, Any]) -> float:
    """What a checkpoint had cost, in rollouts of searches and updates together."""
    return float(sum(line[name] for name in ROLLOUTS))


def last(result: Result) -> Mapping[str, Any]:
    """A run's last checkpoint."""
    line: Mapping[str, Any] = result["lines"][-1]
    return line


def final(result: Result) -> float:
    """Accuracy at the end."""
    return float(last(result)["evolved accuracy"])


def peak(result: Result) -> float:
    """The best that a run came to, smoothed: the largest of nine noisy figures would be too high."""
    return max(value for _, value in smooth(curve(result)))


def first_at(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """Where a curve first reaches a level, linear between its points; None when it never does."""
    before: tuple[float, float] | None = None
    for at, value in points:
        if value >= level:
            if before is None or value == before[1]:
                return at
            return before[0] + (at - before[0]) * (level - before[1]) / (value - before[1])
        before = (at, value)
    return None


def at_level(result: Result, level: float, figure: str) -> float | None:
    """A figure at the first checkpoint whose accuracy is at least the level."""
    return next((line[figure] for line in result["lines"] if line["evolved accuracy"] >= level), None)


# ---- over seeds --------------------------------------------------------------------------------


def shown(values: Sequence[float | None], form: str = ".2f", *, never: float = math.inf) -> str:
    """Median, smallest and largest of values over seeds.

    A value that a run never came to counts as ``never``: it is not left out, which would flatter the runs that failed.
    """
    known = [never if value is None else value for value in values]
    ends_and_middle = (min(known), middle(known, never=never), max(known))
    low, median, high = ("never" if value == never else f"{value:{form}}" for value in ends_and_middle)
    return low if low == high else f"{median} ({low} to {high})"


def middle(values: Sequence[float | None], *, never: float = math.inf) -> float:
    """Median over seeds, where what a run never came to counts as ``never``.

    Of an even number it is the mean of the two in the middle, and ``never`` if one of them is.
    """
    known = [never if value is None else value for value in values]
    if never in (statistics.median_low(known), statistics.median_high(known)):
        return never
    return statistics.median(known)


def ratios(arms: Runs, arm: str, of: Callable[[Result, float], float | None], share: float = 1.0) -> list[float | None]:
    """RL's cost of a share of its own peak over the arm's cost of it, seed by seed: 3 is three times cheaper."""
    values: list[float | None] = []
    for seed, run in arms[arm].items():
        level = share * peak(arms["rl"][seed])
        values.append(times_cheaper(of(arms["rl"][seed], level), of(run, level)))
    return values


def times_cheaper(rl: float | None, its: float | None) -> float | None:
    """RL's cost over another arm's; None where one of them never came there."""
    # What is there before the first update costs no step: counted as one, so that the ratio stays a number.
    return None if rl is None or its is None else max(rl, 1.0) / max(its, 1.0)
