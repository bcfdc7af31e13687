"""Rules about the weight updates. Each takes the history and returns one kind of finding, or None. Pure."""

from statistics import fmean, median

from dspy_fst.monitoring.history import SHORT, WINDOW, Finding, History

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
    seen = f"the importance weight of {share:.1%} of the tokens reached its cap"
    advice = (
        "Find out why the engine disagrees with the trainer (precision, stale weights) before raising importance_cap"
    )
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


UPDATE_RULES = (entropy_collapse, kl_growth, mismatch, capped_tokens, gradient_spike, skipped_update)
