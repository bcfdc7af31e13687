"""Rules about the sampled rollouts. Each takes the history and returns one kind of finding, or None. Pure."""

from collections import Counter
from statistics import fmean

from dspy_fst.monitoring.form_advice import form_advice
from dspy_fst.monitoring.history import SHORT, WINDOW, Finding, History
from dspy_fst.outcomes.counts import OutcomeCounts
from dspy_fst.outcomes.outcome import PARSE
from dspy_fst.run.learning import span
from dspy_fst.types import StepReport

FLAT_SHARE, EDGE = 0.8, 0.25
"""Share of zero-variance groups that leaves too little to learn from, and the distance of the mean reward from an end
of its range, as a share of the range, at which all rollouts count as wrong or as right (ours)."""
MASKED_SHARE = TRUNCATED_SHARE = 0.1
"""Share of rollouts that were masked, and of calls that were cut off (ours)."""
UNTRAINED_SHARE = 0.5
"""Share of measured rollouts that hold no trainable call (ours)."""
REWARD_FALL, REWARD_NOISE = 0.3, 0.1
"""Fall of the mean reward, as a share of its height above the worst reward, and as a share of the whole range (ours).

The larger of the two must be reached."""
MOSTLY = 0.5
"""From this share of unparsed replies on, parsing is the reason why every rollout is wrong (ours)."""
ALL_WRONG = (
    "Nearly every rollout fails: look at some replies (dspy-fst show RUN_DIR --samples 5); then raise search_passes or "
    "group_size, give easier problems, or a metric with partial credit"
)
ALL_RIGHT = "Nearly every rollout succeeds: stop here, or give harder problems"
ALL_ALIKE = "The rollouts of a problem score alike: give a finer metric, or raise group_size or the temperature"
NEARLY_ALL = 0.9
"""From this share of unparsed replies on, a lower score for them has no effect (ours)."""
OR_THE_SCORE = "; or set format_failure_score below failure_score, so that the form is learnt"
NOT_THE_SCORE = (
    ". A lower format_failure_score does not help while nearly every reply fails: it shifts all rewards alike"
)


def flat_groups(history: History) -> Finding | None:
    steps = history.reports[-WINDOW:]
    shares = [r.counts["flat_groups"] / r.counts["groups"] for r in steps if r.counts.get("groups")]
    rewards = [r.reward for r in steps if r.reward is not None]
    if len(shares) < WINDOW or min(shares) < FLAT_SHARE or not rewards:
        return None
    reward, edge = fmean(rewards), EDGE * (history.best - history.worst)
    seen = f"{fmean(shares):.0%} of the groups were flat, so little was learnt; mean reward {reward:.2g}"
    if reward <= history.worst + edge:
        if min(map(_unparsed_share, steps)) >= max(MOSTLY, history.parse_share):
            return None  # `parse_failures` warns instead, with the reason
        return Finding("all wrong", steps, seen + history.reply_clause, ALL_WRONG)
    if reward >= history.best - edge:
        return Finding("all right", steps, seen, ALL_RIGHT)
    return Finding("all alike", steps, seen, ALL_ALIKE)


def parse_failures(history: History) -> Finding | None:
    """Once a cycle, at the first step with too many parse failures: the next cycle has other instructions."""
    *earlier, now = [report for report in history.reports if report.cycle == history.reports[-1].cycle]
    share = _unparsed_share(now)
    if share < history.parse_share or any(_unparsed_share(report) >= history.parse_share for report in earlier):
        return None
    by_predictor = [
        f"{name!r} in {report.unparsed} of its {report.calls} calls"
        for name, report in sorted(now.predictors.items(), key=lambda item: -item[1].unparsed)
        if report.unparsed
    ]
    seen = f"{share:.0%} of the rollouts ended in a reply that does not parse"
    seen += (f" ({'; '.join(by_predictor)})" if by_predictor else "") + history.reply_clause
    advice = form_advice(history.form) + (NOT_THE_SCORE if share >= NEARLY_ALL else OR_THE_SCORE)
    return Finding(f"parse in cycle {now.cycle}", [now], seen, advice)


def _unparsed_share(report: StepReport) -> float:
    counts = Counter(report.counts)
    return OutcomeCounts.of(counts).failed[PARSE] / _measured(counts)


def masked_rollouts(history: History) -> Finding | None:
    counts = history.counts(SHORT)
    masks = OutcomeCounts.of(counts).masked
    if not masks or masks.total() < MASKED_SHARE * counts["rollouts"]:
        return None
    share, (reason, _) = masks.total() / counts["rollouts"], masks.most_common(1)[0]
    seen = f"{share:.0%} of the rollouts measured nothing, most often because of {reason!r}"
    advice = "Mend the cause: what is left is a biased sample"
    return Finding("masked", history.reports[-SHORT:], seen, advice)


def truncated_replies(history: History) -> Finding | None:
    counts = history.counts(SHORT)
    if not counts["calls"] or counts["truncated_calls"] < TRUNCATED_SHARE * counts["calls"]:
        return None
    seen = f"{counts['truncated_calls'] / counts['calls']:.0%} of the replies were cut off at max_tokens"
    advice = "Raise PolicyLM(max_tokens=...), or ask for shorter replies"
    return Finding("truncated", history.reports[-SHORT:], seen, advice)


def replies_cut_by_context(history: History) -> Finding | None:
    counts = history.counts(SHORT)
    cut = counts["truncated_by_context"]
    if not counts["calls"] or cut < TRUNCATED_SHARE * counts["calls"]:
        return None
    seen = (
        f"{cut / counts['calls']:.0%} of the replies were cut off before max_tokens, because prompt and reply filled "
        "the model's context"
    )
    advice = (
        "Shorten the prompts (fewer turns, demos or tools), or raise max_model_len where the model allows it; a higher "
        "max_tokens changes nothing"
    )
    return Finding("context full", history.reports[-SHORT:], seen, advice)


def untrained_rollouts(history: History) -> Finding | None:
    counts = history.counts(SHORT)
    share = counts["no_trained_calls"] / _measured(counts)
    if share < UNTRAINED_SHARE:
        return None
    seen = f"{share:.0%} of the rollouts hold no call that can be trained"
    advice = "Let the program call a predictor that holds the PolicyLM, at a temperature above 0, on every path"
    return Finding("untrained", history.reports[-SHORT:], seen, advice)


def greedy_calls(history: History) -> Finding | None:
    now = history.reports[-1]
    if not (calls := now.counts.get("greedy_calls")):
        return None
    seen = f"{calls} calls were greedy (temperature 0) and have no gradient"
    return Finding("greedy", [now], seen, "Give those predictors a temperature above 0, or a frozen LM")


def reward_fell(history: History) -> Finding | None:
    measured = [(report, report.reward) for report in history.reports if report.reward is not None]
    windows = [measured[i : i + WINDOW] for i in range(len(measured) - WINDOW + 1)]
    means = [fmean(reward for _, reward in window) for window in windows]
    if not means:
        return None
    peak, now = max(means), means[-1]
    allowed = max(REWARD_FALL * (peak - history.worst), REWARD_NOISE * (history.best - history.worst))
    if peak - now < allowed:
        return None
    then, steps = ([report for report, _ in window] for window in (windows[means.index(peak)], windows[-1]))
    advice = (
        "Lower learning_rate, raise kl_coefficient or set max_grad_norm; the run directory keeps the weights of the "
        "step with the best reward"
    )
    return Finding("reward", steps, f"mean reward is {now:.2g}, down from {peak:.2g} in {span(then)}", advice)


def _measured(counts: Counter[str]) -> int:
    """Rollouts that were measured; at least 1, so that it can be divided by."""
    return max(counts["rollouts"] - OutcomeCounts.of(counts).masked.total(), 1)


ROLLOUT_RULES = (
    flat_groups,
    parse_failures,
    masked_rollouts,
    truncated_replies,
    replies_cut_by_context,
    untrained_rollouts,
    greedy_calls,
    reward_fell,
)
