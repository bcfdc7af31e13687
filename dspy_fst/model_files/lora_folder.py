"""Where the parts of weights with LoRA adapters lie. A folder of such a version holds one peft folder an adapter, and:

    lora.json    {"format": 1, "base": "../base", "adapters": ["shared"], "predictors": {}}

``predictors`` tells which predictor of a program speaks through which adapter, where not all speak through one.

The base is a Hugging Face folder. In a run's ``weights/`` all versions share one, ``weights/base``; a saved program has
its own inside the folder. No other place is read, so a folder from somebody else leads nowhere.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dspy_fst.errors import ConfigurationError

INDEX = "lora.json"
FORMAT = 1
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
"""The two files of a peft folder."""
SETTINGS = {
    *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "fan_in_fan_out"),
    *("target_modules", "lora_dropout", "bias", "inference_mode"),
}
"""What adapter_config.json sets; peft has defaults for its other settings."""
INSIDE, BESIDE = "base", "../base"
"""The two places of a base, relative to the folder."""
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-\[\]]*")
"""Names of adapters, e.g. ``"shared"`` or ``"hops[0].query"``; each is a folder's name."""


class LoRAParts(NamedTuple):
    """What a folder of LoRA adapters holds."""

    base: Path
    adapters: dict[str, Path]
    """Name -> peft folder."""
    predictors: dict[str, str]
    """Predictor -> the adapter that it speaks through; empty where all speak through one."""


def index_of(base: str, names: Sequence[str], predictors: Mapping[str, str]) -> dict[str, object]:
    """The contents of lora.json."""
    return {"format": FORMAT, "base": base, "adapters": list(names), "predictors": dict(predictors)}


def lora_parts(folder: Path) -> LoRAParts | None:
    """The parts of a version with LoRA adapters; None for a folder without LoRA adapters of ours.

    Raises:
        ConfigurationError: lora.json is damaged, or names what it may not.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        base, names, predictors = document["base"], document["adapters"], document.get("predictors", {})
        sound = document["format"] == FORMAT and base in (INSIDE, BESIDE) and isinstance(names, list) and names
        sound = sound and {*predictors.values()} <= {*names}
        sound = sound and all(isinstance(name, str) and NAME.fullmatch(name) and name != INSIDE for name in names)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise ConfigurationError(
            [f"{path} is no index of LoRA adapters that this release reads; restore it from a copy"]
        )
    return LoRAParts((folder / base).resolve(), {name: folder / name for name in names}, predictors)


def model_files_in(folder: Path) -> list[Path]:
    """The folders whose files are the weights: the folder itself, or the base and the adapters that it names."""
    parts = lora_parts(folder)
    return [folder] if parts is None else [parts.base, *parts.adapters.values()]
