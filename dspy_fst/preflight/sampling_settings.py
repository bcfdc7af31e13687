"""Checks of the settings that `dspy_fst.reconfigured`, `dspy_fst.load` and ``dspy-fst serve`` take.

They have the names of PolicyLM's arguments. Without these checks a wrong one would only fail at the first call, or when
a folder that was saved with it is loaded.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import get_args

import dspy

from dspy_fst.engine.base import temperature_fault
from dspy_fst.engine.making import EngineKind
from dspy_fst.engine.options import unknown_arguments
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.preflight.unreachable_parts import asked_policies

_TAKEN = [name for name in inspect.signature(PolicyLM).parameters if name != "unknown"]


def sampling_faults(adapter: object, settings: Mapping[str, object]) -> list[str]:
    """A sentence for each fault.

    Args:
        adapter: The program's new adapter; None is not checked.
        settings: Argument of PolicyLM -> value, for the given ones.
    """
    faults = [*_adapter_faults(adapter), *unknown_arguments(settings, _TAKEN), *bad_numbers(settings)]
    if "use_json_adapter_fallback" in settings and not isinstance(settings["use_json_adapter_fallback"], bool):
        faults.append(f"use_json_adapter_fallback={settings['use_json_adapter_fallback']!r}: use True or False")
    if (engine := settings.get("engine", "auto")) not in get_args(EngineKind):
        faults.append(f"engine={engine!r} is unknown; use 'auto', 'vllm' or 'in_process'")
    if not isinstance(options := settings.get("engine_options", {}), Mapping):
        faults.append(f"engine_options={options!r}: pass a dict of the engine's settings")
    return faults


def bad_numbers(settings: Mapping[str, object]) -> Iterator[str]:
    """A sentence for a given temperature or ``max_tokens`` with which no call can be sampled and scored."""
    if "temperature" in settings and (fault := temperature_fault(settings["temperature"])):
        yield fault
    longest = settings.get("max_tokens")
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int) or longest < 1):
        yield f"max_tokens={longest!r}: it must be a whole number above 0, the longest reply in tokens"


def _adapter_faults(adapter: object) -> Iterator[str]:
    if adapter is None:
        return
    if isinstance(adapter, type):
        yield f"adapter: {adapter.__name__} is a class; pass an adapter made of it, {adapter.__name__}(...)"
    elif not isinstance(adapter, dspy.Adapter):
        yield f"adapter={adapter!r}: pass an adapter, e.g. dspy.XMLAdapter()"
    else:
        for kind, name in asked_policies(adapter):
            yield f"adapter: {kind} asks a PolicyLM (its {name}); give it a frozen LM: {name}=dspy.LM(...)"
