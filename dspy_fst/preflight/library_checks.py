"""Which optional libraries a recipe needs that are not installed here."""

from collections.abc import Iterator
from importlib.util import find_spec

from dspy_fst.slow.training_settings import TrainingSettings

QUANTIZED = "pip install 'dspy-fst[quantized]'"
WARM_START = "pip install 'dspy-fst[warm-start]'"


def trl_fault() -> str | None:
    """A sentence if the library of supervised training is missing: of a warm start, and of `LM.finetune`."""
    if find_spec("trl") is not None:
        return None
    return f"supervised training needs trl, which is not installed: {WARM_START}"


def library_faults(config: TrainingSettings) -> Iterator[str]:
    """A sentence for each setting whose library is missing."""
    if find_spec("bitsandbytes") is not None:
        return
    if config.quantized_base == "nf4":
        yield f"quantized_base='nf4' needs bitsandbytes, which is not installed: {QUANTIZED}, or use 'int8'"
    if config.optimizer == "adamw_8bit":
        yield f"optimizer='adamw_8bit' needs bitsandbytes, which is not installed: {QUANTIZED}, or use 'adamw'"
