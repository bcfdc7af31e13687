"""Fast-Slow Training for DSPy: evolve a program's instructions and train its local LM's weights, together.

Each name is imported when it is first asked for: `dspy-fst --help`, or a typo in a project file, needs no torch.
"""

import os
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

from dspy_fst.errors import imported

if TYPE_CHECKING:
    from dspy_fst.config import FSTConfig
    from dspy_fst.errors import ConfigurationError, FSTError, NothingLearnedError
    from dspy_fst.fast.teleprompter_search import TeleprompterSearch
    from dspy_fst.optimizer import FSTOptimizer
    from dspy_fst.policy_lm import PolicyLM
    from dspy_fst.recipe.lora_settings import LoRA
    from dspy_fst.saving.reconfigure import reconfigured
    from dspy_fst.saving.save_load import load, save

__all__ = [
    "ConfigurationError",
    "FSTConfig",
    "FSTError",
    "FSTOptimizer",
    "LoRA",
    "NothingLearnedError",
    "PolicyLM",
    "TeleprompterSearch",
    "load",
    "reconfigured",
    "save",
]

# Torch reads it at its first allocation, so it is set before. Then its CPU tensors of 2 MiB and more lie in huge pages,
# as far as the system has some, and fresh memory for them costs less time. What the user set stands.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_HOMES = {
    **dict.fromkeys(("ConfigurationError", "FSTError", "NothingLearnedError"), "errors"),
    **dict.fromkeys(("load", "save"), "saving.save_load"),
    "FSTConfig": "config",
    "FSTOptimizer": "optimizer",
    "LoRA": "recipe.lora_settings",
    "PolicyLM": "policy_lm",
    "TeleprompterSearch": "fast.teleprompter_search",
    "reconfigured": "saving.reconfigure",
}
"""Public name -> the module that defines it."""

_MOVED = {
    "asking": "saving.reconfigure",
    "compiled": "training.result",
    "export": "saving.export",
    "policy": "policy_lm",
    "saved": "saving.save_load",
}
"""Modules that users may import by their names of release 0.1 -> where their contents are. Gone after release 0.2."""


class _Moved(MetaPathFinder, Loader):
    """An old module's name still imports, with a warning; it hands on every attribute of the new one."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        old = name.removeprefix(f"{__name__}.")
        return ModuleSpec(name, self) if name != old and old in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = f"{__name__}.{_MOVED[module.__name__.removeprefix(f'{__name__}.')]}"
        warnings.warn(f"{module.__name__} is {new} now; the old name goes with the next release", FutureWarning, 2)
        found = imported(new)
        public = sys.modules[__name__]  # the old modules also handed on load and save
        module.__dict__["__getattr__"] = lambda name: getattr(public if name in _HOMES else found, name)


sys.meta_path.append(_Moved())


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(imported(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
