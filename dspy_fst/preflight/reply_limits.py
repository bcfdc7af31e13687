"""How long a reply of each predictor may get, and whether a penalty for long replies can be measured against it."""

import dspy

from dspy_fst.config import FSTConfig
from dspy_fst.preflight.program_checks import policies_of


def reply_limits(program: dspy.Module) -> dict[str, int | None]:
    """Predictor that speaks with a PolicyLM -> ``max_tokens`` of its replies; None: as far as the context goes."""
    configs = {name: predictor.config for name, predictor in program.named_predictors()}
    return {name: configs[name].get("max_tokens", lm.reply_limit) for name, lm in policies_of(program).items()}


def limit_faults(student: object, config: FSTConfig | None) -> list[str]:
    """A fault for ``overlong_penalty`` on predictors whose replies have no limit."""
    if config is None or not config.overlong_penalty or not isinstance(student, dspy.Module):
        return []
    limits = reply_limits(student)
    if not (unlimited := [name for name in config.trained or limits if name in limits and limits[name] is None]):
        return []
    return [
        f"overlong_penalty={config.overlong_penalty:g}: replies are measured against max_tokens, and those of "
        f"{', '.join(unlimited)} have none; set PolicyLM(max_tokens=...)"
    ]
