"""Scores -> Pareto frontier -> the K complementary candidates of a population. Pure functions."""

from collections.abc import Sequence

from gepa.gepa_utils import remove_dominated_programs

Scores = Sequence[Sequence[float]]
"""scores[candidate][anchor]: the reward of each candidate on each anchor, all measured on the same anchors."""


def frontier(scores: Scores) -> list[int]:
    """Candidates that are best somewhere and are not covered by others (GEPA's instance frontier), in order."""
    best_on = {
        anchor: {c for c, row in enumerate(scores) if row[anchor] == max(other[anchor] for other in scores)}
        for anchor in range(len(scores[0]))
    }
    # Candidates are visited from worst to best: of two that cover the same anchors the better stays, then the older.
    order = sorted(range(len(scores)), key=lambda c: (_mean(scores[c]), -c))
    kept = remove_dominated_programs(best_on, scores=[order.index(c) for c in range(len(scores))])
    return sorted(set().union(*kept.values()))


def top_k(scores: Scores, k: int) -> list[int]:
    """K indices, best mean first: those of the frontier that together cover the anchors best.

    Members are added one by one, each time the one that raises the population's best-of score
    sum_a max_c scores[c][a] most; ties go to the higher mean, then to the older candidate. A frontier
    shorter than K is filled up with copies of its best member: a filler of any other kind (the seed, a
    dominated candidate) would take rollouts from candidates that are known to be better.
    """
    remaining = frontier(scores)
    chosen: list[int] = []
    covered = [float("-inf")] * len(scores[0])
    while remaining and len(chosen) < k:

        def gain(candidate: int, covered: list[float] = covered) -> tuple[float, float, int]:
            new = sum(map(max, covered, scores[candidate]))
            return (new, _mean(scores[candidate]), -candidate)

        best = max(remaining, key=gain)
        remaining.remove(best)
        chosen.append(best)
        covered = list(map(max, covered, scores[best]))
    chosen.sort(key=lambda candidate: (-_mean(scores[candidate]), candidate))
    return chosen + [chosen[0]] * (k - len(chosen))


def _mean(row: Sequence[float]) -> float:
    return sum(row) / len(row)
