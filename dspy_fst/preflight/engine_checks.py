"""The options of the engine, checked before it starts."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from dspy_fst.engine.machine import has_gpu
from dspy_fst.policy_lm import PolicyLM

if TYPE_CHECKING:
    from dspy_fst.engine.options import InProcessSettings


def engine_faults(policy: PolicyLM) -> list[str]:
    """Faults of the engine's options."""
    from dspy_fst.engine.options import InProcessSettings, make_settings
    from dspy_fst.engine.vllm.server_settings import VLLMSettings, vllm_faults

    options = policy.handle.options
    if policy.handle.resolved_kind == "in_process":
        return _type_faults(InProcessSettings, options) or list(
            _in_process_faults(make_settings(InProcessSettings, options, "in_process"))
        )
    return _type_faults(VLLMSettings, options) or vllm_faults(make_settings(VLLMSettings, options, "vllm"))


def _type_faults(settings: type, options: Mapping[str, object]) -> list[str]:
    """Engine options of the wrong type: a dataclass accepts anything."""
    hints, faults = get_type_hints(settings), []
    for name, value in options.items():
        given = tuple(value) if isinstance(value, list) else value
        try:
            TypeAdapter(hints[name], config=ConfigDict(strict=True)).validate_python(given)
        except ValidationError as error:
            faults.append(f"engine_options: {name}={value!r}: {error.errors()[0]['msg']}")
    return faults


def _in_process_faults(settings: "InProcessSettings") -> Iterator[str]:
    device = (settings.device or "cpu").split(":")[0]
    rules = {
        "device": (
            "cpu, or cuda where there is a GPU",
            device in ("cpu", "mps", "xpu") or (device == "cuda" and has_gpu()),
        ),
        "max_batch_tokens": ("at least 1", settings.max_batch_tokens >= 1),
        "linger_s": ("a finite number, at least 0", 0 <= settings.linger_s < math.inf),
        "timeout_s": ("more than 0", settings.timeout_s > 0),
        "dtype": ("float32 or bfloat16", settings.dtype in (None, "float32", "bfloat16")),
    }
    for name, (wanted, holds) in rules.items():
        if not holds:
            yield f"engine_options: {name}={getattr(settings, name)!r}: it must be {wanted}"
