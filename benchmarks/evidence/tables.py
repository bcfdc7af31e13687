"""The tables of BENCHMARKS.md, from the raw lines alone.

python -m benchmarks.evidence.tables

A figure is a median over seeds, its interval the smallest and the largest: with three to five seeds nothing else says
more. Arms are compared with RL on the same seed, which means the same problems.
"""

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.arms import ABOUT
from benchmarks.readme import table

RESULTS = Path(__file__).parent.parent / "results"
PAGE = Path(__file__).parent.parent.parent / "BENCHMARKS.md"
SIGNAL = 0.1
"""Accuracy that counts as a first signal where the base has none."""
MATCHED = 0.9
"""Share of RL's peak at which drift is compared."""
ROLLOUTS = ("training rollouts", "search rollouts")
Result = Mapping[str, Any]


def read(form: str) -> list[Result]:
    """The raw lines of a form of the evidence; empty when it was not made yet."""
    path = RESULTS / f"evidence-{form}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


# ---- what a run came to ------------------------------------------------------------------------


def curve(result: Result, of: str = "evolved accuracy") -> list[tuple[float, float]]:
    """(updates, figure) at each measured checkpoint."""
    return [(line["step"], line[of]) for line in result["lines"]]


def spent(result: Result) -> list[tuple[float, float]]:
    """(all rollouts, accuracy): searches count as training does."""
    return [(sum(line[name] for name in ROLLOUTS), line["evolved accuracy"]) for line in result["lines"]]


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


def peak(result: Result) -> float:
    """The best accuracy of a run's checkpoints."""
    return max(value for _, value in curve(result))


# ---- tables ------------------------------------------------------------------------------------


def shown(values: Sequence[float | None], form: str = ".2f") -> str:
    """Median, smallest and largest; how many never came there is said."""
    known = sorted(value for value in values if value is not None)
    missing = len(values) - len(known)
    if not known:
        return "never"
    told = f"{statistics.median(known):{form}} ({known[0]:{form}} to {known[-1]:{form}})"
    return told + (f", never in {missing} of {len(values)}" if missing else "")


def by_arm(results: Sequence[Result], world: str) -> dict[str, dict[int, Result]]:
    """Arm -> seed -> its run from the base, in the order of ABOUT."""
    found: dict[str, dict[int, Result]] = {arm: {} for arm in ABOUT}
    for result in results:
        if result["world"] == world and result["base"] == "base":
            found[result["arm"]][result["seed"]] = result
    return {arm: runs for arm, runs in found.items() if runs}


def ratios(
    arms: Mapping[str, Mapping[int, Result]], arm: str, of: Callable[[Result, float], float | None]
) -> list[float | None]:
    """RL's cost of its own peak over the arm's cost of that accuracy, seed by seed: 3 is three times cheaper."""
    values: list[float | None] = []
    for seed, rl in arms["rl"].items():
        level = peak(rl)
        own, its = of(rl, level), of(arms[arm][seed], level)
        # What is there before the first update costs no step: counted as one, so that the ratio stays a number.
        values.append(None if own is None or its is None else own / max(its, 1.0))
    return values


def efficiency(results: Sequence[Result], world: str) -> str:
    """Claim (a): steps and all rollouts to RL's running peak."""
    arms = by_arm(results, world)
    rows = [
        [
            f"{arm}: {ABOUT[arm]}",
            shown([line_of(run)["evolved accuracy"] for run in runs.values()]),
            shown(ratios(arms, arm, lambda run, level: first_at(curve(run), level)), ".1f"),
            shown(ratios(arms, arm, lambda run, level: first_at(spent(run), level)), ".1f"),
        ]
        for arm, runs in arms.items()
    ]
    return table(["arm", "accuracy at the end", "RL's steps over its", "RL's rollouts over its"], rows)


def line_of(run: Result) -> Mapping[str, Any]:
    """A run's last checkpoint."""
    last: Mapping[str, Any] = run["lines"][-1]
    return last


def drift(results: Sequence[Result], world: str) -> str:
    """Claim (c): exact KL(trained || base) a rollout, where the accuracy first is 0.9 of RL's peak."""
    arms = by_arm(results, world)
    rows = []
    for arm, runs in arms.items():
        if arm == "gepa":
            continue
        levels = {seed: MATCHED * peak(rl) for seed, rl in arms["rl"].items()}
        figures = [f"{text} KL per {per}" for text in ("evolved", "seed") for per in ("token", "rollout")]
        rows.append([arm, *(shown([at_level(run, levels[s], f) for s, run in runs.items()], ".3f") for f in figures)])
    return table(
        ["arm", "own prompts, a token", "own prompts, a rollout", "seed prompts, a token", "seed prompts, a rollout"],
        rows,
    )


def two_by_two(results: Sequence[Result], world: str) -> str:
    """Claim (g): what the weights and the instructions bring alone and together."""
    cells = [
        f"{weights} weights, {text} instructions" for weights in ("base", "trained") for text in ("seed", "evolved")
    ]
    rows = [
        [arm, *(shown([run["cells"][cell] for run in runs.values()]) for cell in cells)]
        for arm, runs in by_arm(results, world).items()
    ]
    return table(["arm", *cells], rows)


def entropy(results: Sequence[Result], world: str) -> str:
    """Claim (h): entropy of the policy in nats a token, mean of the last six updates."""
    rows = [
        [arm, shown([statistics.fmean(value for _, value in run["entropy"][-6:]) for run in runs.values()])]
        for arm, runs in by_arm(results, world).items()
        if all(run["entropy"] for run in runs.values())
    ]
    return table(["arm", "entropy"], rows)


def costs(results: Sequence[Result], world: str) -> str:
    """What a run of each arm spent."""
    names = ["training rollouts", "search rollouts", "reflections", "tokens sampled", "tokens trained", "updates"]
    rows = [
        [arm, *(f"{statistics.median(line_of(run)[name] for run in runs.values()):,.0f}" for name in names)]
        for arm, runs in by_arm(results, world).items()
    ]
    return table(["arm", *names], rows)


def first_signal(results: Sequence[Result], world: str) -> str:
    """Claim (f): updates and rollouts to the first signal where the base has almost none."""
    rows = [
        [
            arm,
            shown([first_at(curve(run), SIGNAL) for run in runs.values()], ".1f"),
            shown([first_at(spent(run), SIGNAL) for run in runs.values()], ",.0f"),
        ]
        for arm, runs in by_arm(results, world).items()
    ]
    return table(["arm", "updates", "all rollouts"], rows)


def second_task(results: Sequence[Result]) -> str:
    """Claim (d): RL on another task from each arm's weights, against RL from the base."""
    found: dict[str, list[float]] = {}
    for result in results:
        if result["arm"] == "rl" and (start := re.fullmatch(r"(\w+?)-(\w+)-\d+", result["base"])):
            found.setdefault(start[1], []).append(line_of(result)["evolved accuracy"])
    worlds = {r["world"] for r in results if "-" in r["base"]}
    fresh = [line_of(r)["evolved accuracy"] for r in results if r["world"] in worlds and r["base"] == "base"]
    return table(
        ["weights of", "accuracy on the second task"], [[k, shown(v)] for k, v in {"base": fresh, **found}.items()]
    )


TABLES: dict[str, Callable[[Sequence[Result], str], str]] = {
    "efficiency": efficiency,
    "drift": drift,
    "two_by_two": two_by_two,
    "entropy": entropy,
    "costs": costs,
    "first_signal": first_signal,
    "second_task": lambda results, _: second_task(results),
}


def rendered(page: str) -> str:
    """The page with every table made anew: ``<!-- efficiency short reverse_drop -->`` to ``<!-- end -->``."""

    def made(found: re.Match[str]) -> str:
        name, form, world = found[1], found[2], found[3]
        results = read(form)
        body = TABLES[name](results, world) if results else "not made yet"
        return f"<!-- {name} {form} {world} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) (\w+) ([\w:.]+) -->\n.*?<!-- end -->", made, page, flags=re.DOTALL)


def main() -> None:
    PAGE.write_text(rendered(PAGE.read_text()))


if __name__ == "__main__":
    main()
