"""Warns when trainer and engine compute in different precisions, which two separate settings decide."""

from collections.abc import Mapping

from dspy_fst.engine.machine import has_gpu

SAME = {"float": "float32", "half": "float16"}
"""vLLM's other names."""


def precision_warnings(precision: str, kind: str, options: Mapping[str, object]) -> list[str]:
    """A sentence when the two differ. An attached server has its own flags and is not checked.

    Args:
        precision: The trainer's, from the recipe.
        kind: ``"vllm"`` or ``"in_process"``.
        options: The engine's options.
    """
    if options.get("attach_url"):
        return []
    trainer = resolved(precision, on_gpu=has_gpu())
    device = str(options.get("device") or ("cuda" if has_gpu() else "cpu"))
    engine = resolved(str(options.get("dtype") or "auto"), on_gpu=device.startswith("cuda"))
    if trainer == engine:
        return []
    other = f", or precision={engine!r}" if engine in ("float32", "bfloat16") else ""
    return [
        f"the trainer computes in {trainer} (precision={precision!r}) and the engine in {engine} (engine_options of "
        f"engine={kind!r}): the importance weights would measure rounding. Use one precision for both: "
        f"engine_options={{'dtype': {trainer!r}}}{other}"
    ]


def resolved(name: str, *, on_gpu: bool) -> str:
    """The number format behind a name: ``"auto"`` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return "bfloat16" if on_gpu else "float32"
    return SAME.get(name, name)
