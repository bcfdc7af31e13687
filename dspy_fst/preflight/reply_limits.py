"""How long a reply of each predictor may get, for the settings that measure against it."""

import math
from collections.abc import Collection, Mapping

import dspy

from dspy_fst.config import FSTConfig
from dspy_fst.preflight.program_checks import policies_of

ROUNDING = 1e-9
"""Shares whose tokens are fewer than one by no more than this are of one token."""
DIGITS = 10_000
"""A share that is proposed has four decimals, rounded up."""


def reply_limits(program: dspy.Module) -> dict[str, int | None]:
    """Predictor that speaks with a PolicyLM -> ``max_tokens`` of its replies; None: as far as the context goes."""
    configs = {name: predictor.config for name, predictor in program.named_predictors()}
    return {name: configs[name].get("max_tokens", lm.reply_limit) for name, lm in policies_of(program).items()}


def longest_reply(program: dspy.Module, trained: Collection[str] | None) -> int:
    """The largest ``max_tokens`` of the trained predictors (None: of all); 1 where none of them has any."""
    limits = reply_limits(program)
    return max((limits.get(name) or 1 for name in trained or limits), default=1)


def limit_faults(student: object, config: FSTConfig | None) -> list[str]:
    """A fault for each setting that needs ``max_tokens``, on trained predictors whose replies have no limit."""
    if config is None or not isinstance(student, dspy.Module):
        return []
    needing = [f"overlong_penalty={config.overlong_penalty:g}"] if config.overlong_penalty else []
    needing += ["loss='dr_grpo'"] if config.loss == "dr_grpo" else []
    limits = reply_limits(student) if needing else {}
    limits = {name: limits[name] for name in config.trained or limits if name in limits}
    faults = _share_faults(limits, config.overlong_share) if config.overlong_penalty else []
    if unlimited := [name for name, limit in limits.items() if limit is None]:
        without = f"those of {', '.join(unlimited)} have none; set PolicyLM(max_tokens=...)"
        faults += [f"{setting}: replies are measured against max_tokens, and {without}" for setting in needing]
    return faults


def _share_faults(limits: Mapping[str, int | None], share: float) -> list[str]:
    """A fault when the penalty grows over less than one token, so that only replies of ``max_tokens`` would meet it."""
    short = {name: limit for name, limit in limits.items() if limit is not None and share * limit < 1 - ROUNDING}
    if not short:
        return []
    least = math.ceil(DIGITS / min(short.values())) / DIGITS
    replies = ", ".join(f"{name} (max_tokens={limit})" for name, limit in short.items())
    return [
        f"overlong_share={share:g}: overlong_penalty grows over that part of max_tokens, and it is less than one token "
        f"of the replies of {replies}; use {least:g} or more, e.g. 0.2, or raise max_tokens"
    ]
