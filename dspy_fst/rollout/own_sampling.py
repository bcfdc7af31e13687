"""The temperature and ``max_tokens`` that a predictor was made with, e.g. ``dspy.Predict(signature, temperature=0.3)``.

DSPy merges a predictor's ``config`` over its LM's settings at every call, and neither saves nor restores it.
"""

from collections.abc import Container
from typing import Any

SAMPLING = ("temperature", "max_tokens")


def own_sampling(predictor: Any) -> dict[str, Any]:
    """What of sampling the predictor itself sets; nothing for a dspy.Flex, which has no settings of its own."""
    config = getattr(predictor, "config", None)
    config = config if isinstance(config, dict) else {}
    return {name: config[name] for name in SAMPLING if config.get(name) is not None}


def set_own_sampling(predictor: Any, own: dict[str, Any]) -> None:
    """Have the predictor set this of sampling and nothing else; its other settings stay."""
    if own != own_sampling(predictor):
        predictor.config = {**{name: of for name, of in predictor.config.items() if name not in SAMPLING}, **own}


def clear_own_sampling(predictor: Any, names: Container[str]) -> None:
    """Have the predictor no longer set these, so that its LM's count."""
    set_own_sampling(predictor, {name: of for name, of in own_sampling(predictor).items() if name not in names})
