"""How long a reply of each predictor may get, for the settings that measure against it."""

from collections.abc import Collection

import dspy

from dspy_fst.config import FSTConfig
from dspy_fst.preflight.program_checks import policies_of


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
    if not (unlimited := [name for name in config.trained or limits if name in limits and limits[name] is None]):
        return []
    without = f"those of {', '.join(unlimited)} have none; set PolicyLM(max_tokens=...)"
    return [f"{setting}: replies are measured against max_tokens, and {without}" for setting in needing]
