"""Scores -> Pareto frontier -> the K complementary candidates of a population. Pure functions."""

from collections.abc import Sequence

from gepa.gepa_utils import remove_dominated_programs

Scores = Sequence[Sequence[float | None]]
"""scores[candidate][anchor]: the reward of each candidate on each anchor; None where it was not measured."""


def frontier(scores: Scores) -> list[int]:
    """Candidates that are best somewhere and are not covered by others (GEPA's instance frontier), in order."""
    best_on = {}
    for anchor in range(len(scores[0])):
        measured = {c: score for c, row in enumerate(scores) if (score := row[anchor]) is not None}
        if measured:
            best_on[anchor] = {c for c, score in measured.items() if score == max(measured.values())}
    # Candidates are visited from worst to best: of two that cover the same anchors the better stays, then the older.
    order = sorted(range(len(scores)), key=lambda c: (mean(scores[c]), -c))
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
            return (sum(_covering(covered, scores[candidate])), mean(scores[candidate]), -candidate)

        best = max(remaining, key=gain)
        remaining.remove(best)
        chosen.append(best)
        covered = _covering(covered, scores[best])
    chosen.sort(key=lambda candidate: (-mean(scores[candidate]), candidate))
    return chosen + [chosen[0]] * (k - len(chosen))


def mean(row: Sequence[float | None]) -> float:
    """Of what was measured; minus infinity where nothing was."""
    measured = [score for score in row if score is not None]
    return sum(measured) / len(measured) if measured else float("-inf")


def _covering(covered: Sequence[float], row: Sequence[float | None]) -> list[float]:
    """The best score on each anchor once the candidate is there; what it did not measure it does not raise."""
    return [best if score is None else max(best, score) for best, score in zip(covered, row, strict=True)]
