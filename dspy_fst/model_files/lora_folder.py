"""Where the parts of weights with LoRA adapters lie. A folder of such a version holds one peft folder an adapter, and:

    lora.json    {"format": 1, "base": "../base", "adapters": ["shared"]}

The base is a Hugging Face folder. In a run's ``weights/`` all versions share one, ``weights/base``; a saved program has
its own inside the folder. No other place is read, so a folder from somebody else leads nowhere.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

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


def index_of(base: str, names: Sequence[str]) -> dict[str, object]:
    """The contents of lora.json."""
    return {"format": FORMAT, "base": base, "adapters": list(names)}


def lora_parts(folder: Path) -> tuple[Path, dict[str, Path]] | None:
    """The base's folder, and adapter -> its peft folder; None for a folder without LoRA adapters of ours.

    Raises:
        ConfigurationError: lora.json is damaged, or names what it may not.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        base, names = document["base"], document["adapters"]
        sound = document["format"] == FORMAT and base in (INSIDE, BESIDE) and isinstance(names, list) and names
        sound = sound and all(isinstance(name, str) and NAME.fullmatch(name) and name != INSIDE for name in names)
    except (OSError, ValueError, TypeError, KeyError):
        sound = False
    if not sound:
        raise ConfigurationError(
            [f"{path} is no index of LoRA adapters that this release reads; restore it from a copy"]
        )
    return (folder / base).resolve(), {name: folder / name for name in names}


def model_files_in(folder: Path) -> list[Path]:
    """The folders whose files are the weights: the folder itself, or the base and the adapters that it names."""
    parts = lora_parts(folder)
    return [folder] if parts is None else [parts[0], *parts[1].values()]
