"""Fast-Slow Training for DSPy: evolve a program's instructions and train its local LM's weights, together.

Each name is imported when it is first asked for: `dspy-fst --help`, or a typo in a project file, needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspy_fst.asking import reconfigured
    from dspy_fst.config import FSTConfig
    from dspy_fst.errors import ConfigurationError, FSTError, NothingLearnedError
    from dspy_fst.optimizer import FSTOptimizer
    from dspy_fst.policy import PolicyLM
    from dspy_fst.saved import load, save

__all__ = [
    "ConfigurationError",
    "FSTConfig",
    "FSTError",
    "FSTOptimizer",
    "NothingLearnedError",
    "PolicyLM",
    "load",
    "reconfigured",
    "save",
]

_HOMES = {
    **dict.fromkeys(("ConfigurationError", "FSTError", "NothingLearnedError"), "errors"),
    **dict.fromkeys(("load", "save"), "saved"),
    "FSTConfig": "config",
    "FSTOptimizer": "optimizer",
    "PolicyLM": "policy",
    "reconfigured": "asking",
}
"""Public name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
