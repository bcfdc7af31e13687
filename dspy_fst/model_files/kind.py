"""Why a model cannot be trained, and which numbers its config leaves out, as far as the config alone tells.

These are functions of a transformers config, so that a run, `dspy-fst sizes` and `dspy-fst check --gpu` agree.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dspy_fst.errors import briefly
from dspy_fst.model_files.architectures import text_writers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SHAPING = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Numbers of a config that shape a model, by transformers' names for them."""


def kind_faults(config: "PreTrainedConfig") -> Iterator[str]:
    """Faults of a model that transformers would load although it writes no text or cannot be trained."""
    classes = config.architectures or []
    if classes and not set(classes) & text_writers():
        # transformers would give it a random head, and report that in its log only.
        yield f"it is a {classes[0]}, which writes no text; choose a causal language model (...ForCausalLM)"
    if quantized := getattr(config, "quantization_config", None):
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else quantized.quant_method
        yield f"its weights are quantized ({method}) and cannot be trained; choose the model in bfloat16 or float32"


def unreadable(path: Path, error: BaseException) -> str:
    """The sentence that transformers cannot read a model's config, and why."""
    missing = "" if path.is_dir() else "there is no such folder, and as a hub model it is "
    return f"{missing}not a model that transformers can read: {briefly(error)}"


def left_out(config: "PreTrainedConfig", written: Mapping[str, object]) -> tuple[str, ...]:
    """Numbers of `SHAPING` that a config.json does not name, so that transformers uses its defaults.

    A text config within another config may leave out some of them, as in published models. There they are reported
    only if all are left out.

    Args:
        config: The config as transformers read it.
        written: The content of config.json.
    """
    text = config.get_text_config()
    names = [name for name in SHAPING if hasattr(text, name)]
    lacking = tuple(name for name in names if not {name, text.attribute_map.get(name)} & set(_keys(written)))
    return lacking if text is config or len(lacking) == len(names) else ()


def _keys(written: Mapping[str, object]) -> Iterator[str]:
    for key, value in written.items():
        yield key
        if isinstance(value, Mapping):
            yield from _keys(value)
