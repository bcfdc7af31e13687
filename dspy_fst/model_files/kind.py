"""What a model's config alone tells of why it cannot be trained, and of numbers that it leaves out.

Functions of a transformers config: a run, `dspy-fst sizes` and `dspy-fst check --gpu` say the same of it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dspy_fst.errors import briefly
from dspy_fst.model_files.architectures import text_writers

SHAPING = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Numbers of a config that shape a model, by the names that transformers gives them all."""


def kind_faults(config: Any) -> Iterator[str]:
    """Models that transformers would load, and that do not write text or cannot be trained."""
    given = config.architectures or []
    if given and not set(given) & text_writers():
        # transformers would put a random head on it, and say so in its log only.
        yield f"it is a {given[0]}, which writes no text; choose a causal language model (...ForCausalLM)"
    if quantized := getattr(config, "quantization_config", None):
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else quantized.quant_method
        yield f"its weights are quantized ({method}) and cannot be trained; choose the model in bfloat16 or float32"


def unreadable(path: Path, error: BaseException) -> str:
    """Says that transformers cannot read a model's config, and why."""
    missing = "" if path.is_dir() else "there is no such folder, and as a hub model it is "
    return f"{missing}not a model that transformers can read: {briefly(error)}"


def left_out(config: Any, written: Mapping[str, Any]) -> tuple[str, ...]:
    """Numbers of `SHAPING` that a config.json does not name, so that transformers puts its defaults there.

    A config within a config may leave out some, as published ones do: it is named only where it leaves out all.

    Args:
        config: As transformers read it.
        written: What config.json holds.
    """
    text = config.get_text_config()
    names = [name for name in SHAPING if hasattr(text, name)]
    lacking = tuple(name for name in names if not {name, text.attribute_map.get(name)} & set(_keys(written)))
    return lacking if text is config or len(lacking) == len(names) else ()


def _keys(written: Mapping[str, Any]) -> Iterator[str]:
    for key, value in written.items():
        yield key
        if isinstance(value, Mapping):
            yield from _keys(value)
