"""The arguments of the optimizer: the run directory, listeners, the metric, and who proposes texts."""

import inspect
from pathlib import Path

import dspy

from dspy_fst.config import FSTConfig
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.rollout.reward import metric_fault

PROPOSER = ("candidate", "reflective_dataset", "components_to_update")
"""Arguments of a proposer, by name (GEPA 0.1.4)."""


def argument_faults(run_dir: object, listeners: object, **switches: object) -> list[str]:
    """Faults of the optimizer's own arguments; ``switches`` are its boolean ones."""
    faults = []
    if run_dir is not None and not (isinstance(run_dir, str | Path) and str(run_dir)):
        faults.append(f"run_dir={run_dir!r}: name a directory, or leave it out for a new one below runs/")
    if not isinstance(listeners, list | tuple) or not all(map(callable, listeners)):
        faults.append(f"listeners={listeners!r}: pass a list of functions that take one event")
    faults += [
        f"{name}={value!r}: use True or False" for name, value in switches.items() if not isinstance(value, bool)
    ]
    return faults


def search_faults(
    config: FSTConfig | None,
    metric: object,
    reflection_lm: object,
    propose: object,
    fast: object = None,
    *,
    exclusive: bool = True,
) -> list[str]:
    """Faults of the metric, the reflection LM and the proposer. Another optimizer than GEPA may need none of the two
    (`dspy_fst.preflight.fast_checks`).

    Args:
        exclusive: Whether a proposer and a reflection LM exclude each other.
    """
    faults = [fault] if (fault := _metric_fault(metric)) else []
    searches = (config is None or config.method != "rl") and fast is None
    if searches and reflection_lm is None and propose is None:
        faults.append(
            "reflection_lm: GEPA needs an LM that proposes instructions; pass reflection_lm=dspy.LM(...), a strong and "
            "frozen one; or propose=..., a function that proposes without an LM; or method='rl', which searches nothing"
        )
    if reflection_lm is not None and propose is not None and exclusive:
        faults.append("propose and reflection_lm are both given: only propose would be asked; remove one of them")
    if propose is not None and (fault := proposer_fault(propose)):
        faults.append(fault)
    if isinstance(reflection_lm, type):
        faults.append(f"reflection_lm: {reflection_lm.__name__} is a class; pass an LM made of it, dspy.LM('...')")
    elif reflection_lm is not None and not isinstance(reflection_lm, dspy.BaseLM):
        faults.append(f"reflection_lm: {type(reflection_lm).__name__} is not a dspy.LM")
    if isinstance(reflection_lm, PolicyLM):
        faults.append("reflection_lm: it is a PolicyLM; the reflection LM must stay frozen, pass another dspy.LM")
    return faults


def _metric_fault(metric: object) -> str | None:
    if isinstance(metric, type):
        return f"metric: {metric.__name__} is a class; pass an instance, or a function (gold, pred, trace=None, ...)"
    if inspect.iscoroutinefunction(metric):
        return f"metric: {metric.__name__} is asynchronous; pass a plain function (gold, pred, trace=None, ...)"
    return metric_fault(metric)


def proposer_fault(propose: object, setting: str = "propose", wanted: tuple[str, ...] = PROPOSER) -> str | None:
    if not callable(propose):
        return f"{setting}: {propose!r} is not callable; pass a function ({', '.join(wanted)}) -> {{component: text}}"
    try:
        inspect.signature(propose).bind(**dict.fromkeys(wanted))
    except TypeError as error:
        return f"{setting}: it must take the arguments {', '.join(wanted)} by name ({error})"
    except ValueError:
        return None  # a callable without a signature
    return None
