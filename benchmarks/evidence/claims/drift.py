"""Claim (c): the weights move less from the base at matched reward, and keep what the base could do.

KL is exact over the vocabulary at each token of replies that the trained weights sampled on held-out problems. Reward
is matched under an arm's own instruction; under the seed's an arm may say nothing of the task there, and so differ
little, which is why figures at the end of the run stand beside. "Other instructions" is the accuracy at the end on all
of the laboratory's single operations when they are told; the base's own stands in brackets.
"""

from collections.abc import Sequence

from benchmarks.evidence.raw import Lacking, Result, Runs, at_level, by_arm, last, need_peak, peak, shown
from benchmarks.readme import table

TOKEN, OWN, SEED = ("evolved KL per token", "evolved KL per rollout", "seed KL per rollout")
HEAD = [
    "own prompts, a token",
    "own prompts, a rollout",
    "own prompts, of RL's",
    "seed prompts, of RL's",
    "at the end, own prompts, of RL's",
    "at the end, seed prompts, of RL's",
    "other instructions",
]
MATCHED = 0.9
"""Share of RL's peak at which drift is compared."""


def rows(results: Sequence[Result], world: str, base: str = "base") -> str:
    arms = by_arm(results, world, base)
    need_peak(arms)
    if any(
        "seed KL per rollout" not in line for runs in arms.values() for run in runs.values() for line in run["lines"]
    ):
        raise Lacking("no drift under the seed at every checkpoint")
    body = []
    for arm, runs in arms.items():
        if not any(last(run)["updates"] for run in runs.values()):
            continue  # its weights are the base's
        absolute = [shown(list(matched(arms, arm, name).values()), ".3f") for name in (TOKEN, OWN)]
        beside_rl = [shown(of_rl(arms, arm, name)) for name in (OWN, SEED)]
        at_the_end = [
            shown([_ratio(last(run)[name], last(arms["rl"][seed])[name]) for seed, run in runs.items()])
            for name in (OWN, SEED)
        ]
        kept = shown([run["other instructions"]["trained"] for run in runs.values()])
        before = shown([run["other instructions"]["base"] for run in runs.values()])
        body.append([arm, *absolute, *beside_rl, *at_the_end, f"{kept} [{before}]"])
    return table(["arm", *HEAD], body)


def matched(arms: Runs, arm: str, figure: str) -> dict[int, float | None]:
    """Seed -> a figure where the arm first comes to `MATCHED` of RL's peak; None when it never does."""
    return {seed: at_level(run, MATCHED * peak(arms["rl"][seed]), figure) for seed, run in arms[arm].items()}


def of_rl(arms: Runs, arm: str, figure: str) -> list[float | None]:
    """The same over RL's own on the same seed."""
    rl = matched(arms, "rl", figure)
    return [_ratio(its, rl[seed]) for seed, its in matched(arms, arm, figure).items()]


def _ratio(its: float | None, of_rl: float | None) -> float | None:
    return None if its is None or of_rl is None else its / of_rl
