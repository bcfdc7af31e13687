"""What is left of a pretrained model's other abilities: a task that no arm saw, and plain text."""

from collections.abc import Sequence

from benchmarks.evidence.raw import Lacking, Result, by_arm, last, shown
from benchmarks.readme import table

HEAD = ["weights after", "accuracy on another task", "perplexity of plain text", "KL from the base, nats a reply"]


def rows(results: Sequence[Result], world: str, base: str = "base") -> str:
    """Of arms that trained weights; the first line is the base's own.

    Raises:
        Lacking: no run measured them.
    """
    arms = {
        arm: list(runs.values())
        for arm, runs in by_arm(results, world, base).items()
        if any(last(run)["updates"] for run in runs.values())
        and all(run.get("perplexity", {}).get("trained") for run in runs.values())
    }
    if not arms:
        raise Lacking("no run measured plain text")
    seeds = max(arms.values(), key=len)
    body = [["the base", *_abilities(seeds, "base"), "0.00"]]
    for arm, runs in arms.items():
        moved = shown([last(run)["evolved KL per rollout"] for run in runs])
        body.append([arm, *_abilities(runs, "trained"), moved])
    return table(HEAD, body)


def _abilities(runs: Sequence[Result], weights: str) -> list[str]:
    other = shown([run["other instructions"][weights] for run in runs])
    return [other, shown([run["perplexity"][weights] for run in runs], ".1f")]
