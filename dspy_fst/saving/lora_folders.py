"""The LoRA adapters of a saved program as peft folders for others, without their base.

    OUT/adapter_config.json, adapter_model.safetensors     where all predictors share one adapter
    OUT/ADAPTER/adapter_config.json, ...                   one folder for each adapter, where there are several
    OUT/program.json, population.json                      the texts
    OUT/README.md                                          a model card

Each adapter_config.json names the base, as peft's own does. The base is a hub model, or a folder of this machine.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from dspy_fst.engine.base import Checkpoint
from dspy_fst.errors import ConfigurationError, RunDirectoryError
from dspy_fst.model_files.hub import means_a_path
from dspy_fst.model_files.lora_folder import CONFIG, TENSORS
from dspy_fst.model_files.weights_digest import weights_digest
from dspy_fst.saving.card import Facts
from dspy_fst.saving.manifest import read_document

NAMES_BASE = "base_model_name_or_path"


@dataclass(frozen=True)
class Base:
    """The model that the LoRA adapters belong to."""

    name: str
    """A hub name, or the path of a folder on this machine."""
    digest: str
    """See `weights_digest`."""

    @property
    def on_hub(self) -> bool:
        return not means_a_path(self.name)


@dataclass(frozen=True)
class Exported:
    """One LoRA adapter of the folder."""

    name: str
    folder: str
    """Below OUT; ``"."`` is OUT itself."""
    predictors: tuple[str, ...]
    """Those that speak through it."""
    rank: int
    alpha: float
    layers: int
    """Number of layers that it changes."""


def base_of(checkpoint: Checkpoint, facts: Facts, given: str | None) -> Base:
    """The base under the name that others know: the one given, else where the run took it from, else the saved copy.
    A base that the run rounded is the saved copy alone.

    Args:
        given: A hub name, or a folder, whose numbers are then compared with the base's.

    Raises:
        ConfigurationError: the given folder holds other numbers.
        RunDirectoryError: the base cannot be read.
    """
    try:
        digest = weights_digest(checkpoint.path)
    except ValueError as error:
        raise RunDirectoryError(str(error)) from error
    if given is not None and means_a_path(given):
        if not _same(Path(given), digest):
            raise ConfigurationError(
                [f"base={given!r}: it holds other weights than the LoRA adapters were trained on (sha256 {digest})"]
            )
        return Base(str(Path(given).resolve()), digest)
    if name := given or (None if facts.rounded else facts.base):
        return Base(name, digest)
    folder = facts.base_folder
    return Base(str((folder if folder and _same(folder, digest) else checkpoint.path).resolve()), digest)


def _same(folder: Path, digest: str) -> bool:
    try:
        return weights_digest(folder) == digest
    except ValueError:
        return False


def write_adapters(folder: Path, checkpoint: Checkpoint, facts: Facts, base: Base) -> list[Exported]:
    """Write the adapters below a folder that exists, each with the base's name in its configuration."""
    several = len(checkpoint.adapters) > 1
    written = []
    for adapter in checkpoint.adapters:
        below = adapter.name if several else "."
        (folder / below).mkdir(exist_ok=True)
        shutil.copyfile(adapter.path / TENSORS, folder / below / TENSORS)
        config = {**read_document(adapter.path / CONFIG), NAMES_BASE: base.name}
        (folder / below / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        speak = through(checkpoint, facts.policy.predictors)
        predictors = tuple(name for name, chosen in speak.items() if chosen == adapter.name)
        with safe_open(adapter.path / TENSORS, framework="numpy") as stored:
            layers = sum(name.endswith(".lora_A.weight") for name in stored.keys())  # noqa: SIM118
        written.append(Exported(adapter.name, below, predictors, config["r"], config["lora_alpha"], layers))
    return written


def through(checkpoint: Checkpoint, predictors: Mapping[str, object]) -> dict[str, str | None]:
    """Predictor -> the LoRA adapter that it speaks through; None: the base alone."""
    chosen = {name: checkpoint.adapter(checkpoint.predictors.get(name)) for name in predictors}
    return {name: adapter.name if adapter else None for name, adapter in chosen.items()}
