"""What a run of each arm came to at each checkpoint, and what it had spent by then: for runs too few for a curve."""

from collections.abc import Sequence

from benchmarks.evidence.raw import Result, all_rollouts, by_arm, shown
from benchmarks.readme import table

HEAD = ["arm", "updates", "accuracy", "parsed", "accuracy, seed instructions", "KL from the base, nats a reply"]
SPENT = ["rollouts of all kinds", "tokens sampled", "CPU minutes of the training"]


def rows(results: Sequence[Result], world: str, base: str = "base") -> str:
    made = []
    for arm, runs in by_arm(results, world, base).items():
        for lines in zip(*(run["lines"] for run in runs.values()), strict=True):
            last = lines[0]["step"] == max(line["step"] for line in next(iter(runs.values()))["lines"])
            seed = [line["seed accuracy"] for line in lines if "seed accuracy" in line]
            seconds = [run["CPU seconds"] for run in runs.values()]
            minutes = [second["training"] / 60 for second in seconds if second]  # a continued run does not know its own
            made.append(
                [
                    arm,
                    str(lines[0]["step"]),
                    shown([line["evolved accuracy"] for line in lines]),
                    shown([line["evolved parsed"] for line in lines]),
                    shown(seed) if seed else "",
                    shown([line["evolved KL per rollout"] for line in lines]),
                    shown([all_rollouts(line) for line in lines], ",.0f"),
                    shown([line["tokens sampled"] for line in lines], ",.0f"),
                    shown(minutes, ".1f") if last and minutes else "",
                ]
            )
    return table([*HEAD, *SPENT], made)
