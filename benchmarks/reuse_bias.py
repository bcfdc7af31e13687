"""By how much the rewards of reused rollouts are too high, because the members were chosen by them.

    python -m benchmarks.reuse_bias

Candidates are simulated, and `top_k` chooses of them as it does in a search. A candidate's chance on an anchor is
``logistic(anchor + candidate)``, where anchors have a standard deviation of 2 and candidates one of 0 (all are equally
good, so that every difference of their scores is chance) or of 1. Each has one rollout an anchor. What is printed is
the mean over the chosen candidates' rollouts of the reward less its chance, and the standard error of that mean over
the simulated searches.
"""

import argparse
import math
import random
from statistics import fmean, stdev

from dspy_fst.fast.pareto import top_k

CHOSEN = 4
"""K of the paper."""


def bias(candidates: int, anchors: int, spread: float, draw: random.Random) -> float:
    """Mean reward less its chance over the rollouts of the chosen candidates of one simulated search.

    Args:
        candidates: With a score on every anchor.
        spread: Standard deviation of the candidates' log-odds.
    """
    levels = [draw.gauss(0, 2) for _ in range(anchors)]
    skills = [draw.gauss(0, spread) for _ in range(candidates)]
    chances = [[1 / (1 + math.exp(-(level + skill))) for level in levels] for skill in skills]
    rewards = [[float(draw.random() < chance) for chance in row] for row in chances]
    chosen = {*top_k(rewards, CHOSEN)}
    return fmean(rewards[i][anchor] - chances[i][anchor] for i in chosen for anchor in range(anchors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=400, help="simulated searches for each row")
    searches = parser.parse_args().searches
    print("| candidates | anchors | candidates differ by | reward too high by |\n| --- | --- | --- | --- |")
    for candidates in (6, 12):
        for anchors in (32, 192):
            for spread in (0.0, 1.0):
                draw = random.Random(f"{candidates} {anchors} {spread}")
                found = [bias(candidates, anchors, spread, draw) for _ in range(searches)]
                error = stdev(found) / searches**0.5
                print(f"| {candidates} | {anchors} | {spread:g} | {fmean(found):.3f} ± {error:.3f} |")


if __name__ == "__main__":
    main()
