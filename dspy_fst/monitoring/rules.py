"""Rules that find problems which raise no error. Each takes the history and returns one finding, or None. Pure."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from dspy_fst.outcomes.outcome import PARSE, OutcomeCounts
from dspy_fst.run.learning import span
from dspy_fst.run.phase_reports import StepReport

# ---- advice for replies that do not parse --------------------------------------------------------


COOL = 0.5
"""Up to this temperature a lower one is not advised (ours; the parse trial uses this temperature)."""


@dataclass(frozen=True)
class Form:
    """The form of a program's prompts now, and what is known of other forms."""

    adapter: str = "ChatAdapter"
    """Class name of the adapter."""
    demos: bool = False
    """Whether any predictor shows demos."""
    temperature: float | None = None
    """Of sampling; None where it is not known."""
    helped: str = ""
    """The best form in a trial and its result, e.g. ``"JSONAdapter, 2 demos (75% parsed)"``.

    Empty when no trial was made, or when no other form was better.
    """
    tried: bool = False
    """Whether a trial of other forms was made on this model and task."""


def form_advice(form: Form) -> str:
    """What to change, as a sentence without a full stop.

    >>> form_advice(Form())[:75]
    'Raise max_tokens if they are cut off; else try dspy.configure(adapter=dspy.'
    >>> form_advice(Form("JSONAdapter", demos=True, temperature=0.3))[:82]
    'Raise max_tokens if they are cut off; else try simpler output fields, a warm start'
    """
    first = "Raise max_tokens if they are cut off; else try "
    if form.helped:
        return f"{first}what did best when it was tried on this model: {form.helped}"
    ways = []
    if not form.tried:
        ways += ["dspy.configure(adapter=dspy.JSONAdapter())"] if form.adapter != "JSONAdapter" else []
        ways += ["two demos"] if not form.demos else []
        ways += ["a lower temperature"] if form.temperature is None or form.temperature > COOL else []
    warm = "a warm start (warm_start='labels', or teacher=program)"
    return first + ", ".join([*ways, "simpler output fields", warm, "or a stronger instruct model"])


# ---- what rules read and return ------------------------------------------------------------------


WINDOW = 5
"""Steps over which a slow problem must last, or over which a level is averaged (ours). A single batch is noise."""
SHORT = 3
"""The same for shares of a step's rollouts or tokens (ours). One batch measures those well."""


@dataclass(frozen=True)
class Finding:
    """One problem that a rule found. Findings of the same kind in consecutive steps are one episode."""

    kind: str
    """E.g. ``"entropy"``."""
    steps: Sequence[StepReport]
    """The steps that show it."""
    seen: str
    """What was measured, without a full stop."""
    advice: str
    """What to do, without a full stop."""

    def __str__(self) -> str:
        return f"{span(self.steps)}: {self.seen}. {self.advice}"


@dataclass(frozen=True)
class History:
    """The step reports so far, and what is needed to judge them."""

    reports: Sequence[StepReport]
    """The newest last."""
    worst: float
    """Reward of a failed rollout."""
    best: float
    """Reward of a perfect rollout."""
    parse_share: float
    """``FSTConfig.parse_warning_share``."""
    form: Form = field(default_factory=Form)
    """The form of the program's prompts now."""
    reply: str = ""
    """A failed reply of the newest step and why it failed; empty when no reply failed."""
    loss: str = "cispo"
    fresh: bool = True
    """Whether every optimizer step learns from rollouts of its own weights."""

    @property
    def reply_clause(self) -> str:
        """The reply as the end of a sentence; empty when there is none."""
        return f". {self.reply}" if self.reply else ""

    def updates(self, field: str) -> list[tuple[StepReport, float]]:
        """Each step that moved the weights, with one field of its UpdateReport.

        Other steps report zeros that measure nothing. A number that is not finite reads back from disk as None, so both
        are left out: a continued run must find what an uninterrupted run finds.
        """
        pairs = [(report, getattr(report.update, field)) for report in self.reports if report.update.tokens]
        return [(report, value) for report, value in pairs if value is not None and math.isfinite(value)]

    def counts(self, steps: int) -> Counter[str]:
        """Sums over the counts of the newest ``steps`` steps."""
        return sum((Counter(report.counts) for report in self.reports[-steps:]), Counter())


# ---- the sampled rollouts ------------------------------------------------------------------------


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
    masks, rollouts = OutcomeCounts.of(counts).masked, counts["rollouts"]
    if not masks or not rollouts or masks.total() < MASKED_SHARE * rollouts:
        return None
    share, (reason, _) = masks.total() / rollouts, masks.most_common(1)[0]
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


def taken_back(history: History) -> Finding | None:
    now = history.reports[-1]
    if not (count := now.counts.get("taken_back_problems")):
        return None
    seen = (
        f"{now.counts['retired_problems']} problems were solved and retired (retire_solved), too many to fill a batch "
        f"with others; {count} that were retired longest ago were taken back"
    )
    return Finding("retired", [now], seen, "Stop here, give harder problems, or lower problems_per_step")


def reward_fell(history: History) -> Finding | None:
    if "retired_problems" in history.reports[-1].counts:  # retire_solved: the batches lose their solved problems
        return None
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
    taken_back,
    reward_fell,
)


# ---- the weight updates --------------------------------------------------------------------------


ENTROPY_SHARE, ENTROPY_FLOOR = 0.1, 0.01
"""Entropy has collapsed below this share of the first steps' entropy, or below this many nats a token. DAPO
(arXiv 2503.14476) describes the collapse and the stall after it. The levels are ours: a healthy run of the laboratory
keeps a quarter of its entropy."""
KL_LEVEL, KL_GROWTH = 0.5, 3.0
"""A KL to the start above this level, in nats a token, that grew by this factor within `WINDOW` steps is a problem
(ours: a healthy run of the laboratory ends at 0.1 to 0.3)."""
EFFECTIVE_SHARE, LOG_RATIO = 0.9, 0.05
"""Lowest effective sample share, and largest mean log-ratio of trainer to sampler in nats a token. Both are ours:
log-ratios with a standard deviation of a third of a nat reach both. verl's guide to rollout correction calls 0.3 and
0.1 grave."""
CAPPED_SHARE = 0.01
"""Share of tokens whose importance weight reached its cap (ours). With one update a batch hardly any should."""
SPIKE, SPIKE_HISTORY = 10.0, 20
"""Gradient norm as a multiple of the median norm, and the number of earlier updates in that median (ours)."""


def entropy_collapse(history: History) -> Finding | None:
    known = history.updates("entropy")
    if len(known) < 2 * SHORT:
        return None
    first, now = fmean(value for _, value in known[:SHORT]), fmean(value for _, value in known[-SHORT:])
    if now >= max(ENTROPY_SHARE * first, ENTROPY_FLOOR):
        return None
    seen = f"entropy is {now:.2g} nats a token, after {first:.2g} in the first steps: the policy repeats itself"
    advice = "Lower learning_rate, or raise kl_coefficient or the PolicyLM's temperature"
    return Finding("entropy", [report for report, _ in known[-SHORT:]], seen, advice)


def kl_growth(history: History) -> Finding | None:
    known = history.updates("kl_to_start")[-WINDOW - 1 :]
    if len(known) <= WINDOW:
        return None
    before, now = known[0][1], known[-1][1]
    if now < max(KL_LEVEL, KL_GROWTH * before):
        return None
    seen = f"KL to the start grew from {before:.2g} to {now:.2g} nats a token"
    advice = "Lower learning_rate, raise kl_coefficient or set max_grad_norm"
    return Finding("kl", [report for report, _ in known], seen, advice)


def mismatch(history: History) -> Finding | None:
    shares = history.updates("effective_sample_share")[-SHORT:]
    ratios = history.updates("mean_log_ratio")[-SHORT:]
    if not shares or not ratios:
        return None
    share, ratio = fmean(value for _, value in shares), fmean(value for _, value in ratios)
    if share >= EFFECTIVE_SHARE and abs(ratio) <= LOG_RATIO:
        return None
    seen = (
        f"the engine does not sample quite what the trainer scores: effective sample share {share:.2g} (1 is exact), "
        f"mean log-ratio {ratio:.2g} nats a token (0 is exact)"
    )
    advice = "Let both work in the same precision (dtype), and look for sampling settings of the server"
    return Finding("mismatch", [report for report, _ in shares], seen, advice)


def capped_tokens(history: History) -> Finding | None:
    known = history.updates("capped_share")[-SHORT:]
    if not known or (share := fmean(value for _, value in known)) < CAPPED_SHARE:
        return None
    if history.loss != "cispo" and not history.fresh:  # then a clip is there to act
        return None
    cause = "Find out why the engine disagrees with the trainer (precision, stale weights) before"
    seen, advice = (
        f"the importance weight of {share:.1%} of the tokens reached its cap",
        f"{cause} raising importance_cap",
    )
    if history.loss != "cispo":
        seen = f"{share:.1%} of the tokens had no gradient: their importance weight left the clip of {history.loss}"
        advice = f"{cause} widening clip"
    return Finding("capped", [report for report, _ in known], seen, advice)


def gradient_spike(history: History) -> Finding | None:
    known = history.updates("grad_norm")
    if len(known) <= WINDOW or known[-1][0] is not history.reports[-1]:
        return None
    usual, (step, norm) = median(value for _, value in known[-SPIKE_HISTORY - 1 : -1]), known[-1]
    if norm < SPIKE * usual or not usual:
        return None
    seen = f"gradient norm {norm:.2g}, {norm / usual:.0f} times the usual {usual:.2g}"
    return Finding("spike", [step], seen, "If it comes again, set max_grad_norm a little above the usual norm")


def skipped_update(history: History) -> Finding | None:
    now = history.reports[-1]
    if now.update.skipped is None:
        return None
    seen = f"the update was skipped: {now.update.skipped}"
    return Finding("skipped", [now], seen, "If it goes on, lower learning_rate or set max_grad_norm")


def out_of_memory(history: History) -> Finding | None:
    now = history.reports[-1]
    if now.update.halved_to is None:
        return None
    seen = f"the update ran out of memory and was made again with micro-batches of {now.update.halved_to} tokens"
    return Finding("out of memory", [now], seen, "The run keeps that size; set micro_batch_tokens to it in a new run")


UPDATE_RULES = (entropy_collapse, kl_growth, mismatch, capped_tokens, gradient_spike, skipped_update, out_of_memory)
