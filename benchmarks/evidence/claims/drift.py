"""Claim (c): the weights move less from the base at matched reward, and keep what the base could do.

KL is exact over the vocabulary at each token of replies that the trained weights sampled on held-out problems, under
the arm's own instruction and under the seed's. "Other instructions" is the accuracy on all of the laboratory's single
operations when they are told, at the end of the run; the base's own stands in the cell's brackets.
"""

from collections.abc import Mapping, Sequence

from benchmarks.evidence.raw import Result, Runs, at_level, by_arm, last, peak, shown
from benchmarks.readme import table

MATCHED = 0.9
"""Share of RL's peak at which drift is compared."""


def rows(results: Sequence[Result], world: str, base: str = "base") -> str:
    arms = by_arm(results, world, base)
    figures = [f"{text} KL per {per}" for text in ("evolved", "seed") for per in ("token", "rollout")]
    body = []
    for arm, runs in arms.items():
        if not any(last(run)["updates"] for run in runs.values()):
            continue  # its weights are the base's
        levels = {seed: MATCHED * peak(rl) for seed, rl in arms["rl"].items()}
        kept = shown([run["other instructions"]["trained"] for run in runs.values()])
        before = shown([run["other instructions"]["base"] for run in runs.values()])
        moved = [shown([at_level(run, levels[s], name) for s, run in runs.items()], ".3f") for name in figures]
        body.append([arm, *moved, shown(_of_rl(arms, arm, levels)), f"{kept} [{before}]"])
    head = ["own prompts, a token", "own prompts, a rollout", "seed prompts, a token", "seed prompts, a rollout"]
    return table(["arm", *head, "own prompts, of RL's", "other instructions"], body)


def _of_rl(arms: Runs, arm: str, levels: Mapping[int, float]) -> list[float | None]:
    """The arm's drift in a rollout over RL's on the same seed; None where it never came to the level."""
    ratios: list[float | None] = []
    for seed, run in arms[arm].items():
        its, rl = (at_level(of, levels[seed], "evolved KL per rollout") for of in (run, arms["rl"][seed]))
        ratios.append(None if its is None or rl is None else its / rl)
    return ratios
