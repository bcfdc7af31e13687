"""A model's shape: what the memory formulas need to know, from the headers of its files or from its config alone.

No weights are read and nothing but a config is downloaded. From a config alone, the model is built on torch's meta
device, which holds shapes and takes no memory. Both ways give the same numbers.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dspy_fst.errors import ConfigurationError
from dspy_fst.model_files.architectures import empty_model, kind_faults, largest, left_out, unreadable
from dspy_fst.model_files.folder import stored_shapes
from dspy_fst.model_files.hub import known_models, unknown_fault
from dspy_fst.model_files.reading import read_config
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.recipe.lora_settings import ALL_LINEAR, LoRA

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class ModelSize:
    """The size of a model according to its files or its config. Counts and widths are numbers, not bytes."""

    parameters: int
    """Tied ones counted once, e.g. 596,049,920."""
    untied: int
    """Parameters of the published weights, which hold a tied head twice, e.g. 751,632,384."""
    vocabulary: int
    width: int
    inner_width: int
    layers: int
    queries: int
    """Width of a layer's queries: heads times head width."""
    keys: int
    """Width of a layer's keys, and of its values."""
    normed_heads: bool
    """Whether queries and keys have norms of their own, as in Qwen3."""
    heads: int = 1
    """Of a layer's queries; a size that was stored before they were counted has one."""
    linear: tuple[tuple[str, int], ...] = ()
    """Name of a linear layer that may get a LoRA adapter, e.g. ``q_proj`` -> its inputs and outputs, summed over all
    layers of this name."""
    in_linear: int = 0
    """Numbers that a quantised base rounds: the weights of the text part's linear layers. Fused experts are no such
    layers, nor are routers."""
    assumed: tuple[str, ...] = ()
    """Settings that config.json leaves out, so that transformers' defaults are counted."""

    @property
    def cached(self) -> int:
        """Numbers in a token's keys and values over all layers."""
        return 2 * self.layers * self.keys

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and as many of the head."""
        return self.vocabulary * self.width

    @property
    def body(self) -> int:
        """Parameters without the embedding and the head."""
        return max(0, self.parameters - self.embedding * (1 if self.tied else 2))

    def adapted(self, lora: LoRA) -> int:
        """Parameters of one LoRA adapter on this model."""
        named = {name.rpartition(".")[2] for name in lora.target}
        return lora.rank * sum(width for name, width in self.linear if lora.target == ALL_LINEAR or name in named)

    @property
    def tied(self) -> bool:
        return self.untied > self.parameters


def model_size(folder: Path) -> ModelSize | None:
    """The size of a local model; None when its config cannot be read or a weights file is broken.

    Args:
        folder: A Hugging Face folder, with or without weights; or a hub name whose config is in the local cache.
    """
    try:
        return _size_of(read_config(folder, local_files_only=True), folder)
    except Exception:  # a foreign file may break in any way; `model_faults` and `find_size` say how
        return None


def find_size(model: str) -> ModelSize:
    """The size of a model in a folder or on a hub; no weights are needed.

    Raises:
        ConfigurationError: the model is not found, with the places that were searched; or it cannot be trained.
    """
    if fault := unknown_fault(model):
        raise ConfigurationError([fault])
    config = _config_of(model)
    if faults := [f"model={model!r}: {fault}" for fault in kind_faults(config)]:
        raise ConfigurationError(faults)
    try:
        size = _size_of(config, Path(model))
    except ValueError:  # a weights file is broken; a run reports that
        size = size_of_config(config)
    if size is None:
        raise ConfigurationError([f"model={model!r}: transformers cannot make a model of its config"])
    return size


def _config_of(model: str) -> "PreTrainedConfig":
    """The config of a folder, of the hub's cache, of a well-known model or of the hub, whichever comes first."""
    from transformers import AutoConfig

    with suppress(Exception):  # try the next place; the last one reports the error
        return read_config(model, local_files_only=True)
    try:
        known = None if Path(model).is_dir() else known_models().get(model)
        if known is None:
            return read_config(model)
        shape = dict(known)
        return AutoConfig.for_model(str(shape.pop("model_type")), **shape)
    except Exception as error:  # a hub refuses in many ways, and a foreign file may break in any
        raise ConfigurationError([f"model={model!r}: {unreadable(Path(model), error)}"]) from error


def _size_of(config: "PreTrainedConfig", folder: Path) -> ModelSize | None:
    """The size by the headers of the weights if the folder has any, else by the config.

    Raises:
        ValueError: a weights file is broken.
    """
    size = _size(config, stored_shapes(folder))
    written = folder / "config.json"
    if size is None or not written.is_file():
        return size
    return replace(size, assumed=left_out(config, json.loads(written.read_text(encoding="utf-8"))))


def shape_faults(policy: PolicyLM) -> list[str]:
    """Why the size of a policy's model is unknown. Nothing else about its files is checked."""
    try:
        find_size(str(policy.checkpoint.path))
    except ConfigurationError as error:
        return list(error.faults)
    return []


def size_of_config(config: "PreTrainedConfig") -> ModelSize | None:
    """The size of the model that a transformers config describes; None when transformers cannot build it."""
    return _size(config, {})


def _size(config: "PreTrainedConfig", stored: Mapping[str, tuple[int, ...]]) -> ModelSize | None:
    """
    Args:
        stored: Shapes in the files of the weights; empty where there are none.
    """
    try:
        model = empty_model(config)
    except Exception:  # a model's code may raise anything on a foreign config
        return None
    shapes = stored or {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    linear, in_linear = _linear(model)
    tied = getattr(config.get_text_config(), "tie_word_embeddings", getattr(config, "tie_word_embeddings", False))
    parameters = sum(math.prod(shape) for name, shape in shapes.items() if not (tied and name == HEAD))
    heads = largest(config, "num_attention_heads") or 1
    width, layers = largest(config, "hidden_size") or 0, largest(config, "num_hidden_layers") or 0
    vocabulary = largest(config, "vocab_size") or 0
    head_width = largest(config, "head_dim") or width // heads
    return ModelSize(
        parameters=parameters,
        untied=parameters + (vocabulary * width if tied else 0),
        vocabulary=vocabulary,
        width=width,
        inner_width=_inner_width(config) or 4 * width,
        layers=layers,
        queries=head_width * heads,
        keys=head_width * (largest(config, "num_key_value_heads") or heads),
        normed_heads=any(".q_norm." in name for name in shapes),
        heads=heads,
        linear=linear,
        in_linear=in_linear,
    )


def _linear(model: "PreTrainedModel") -> tuple[tuple[tuple[str, int], ...], int]:
    """What `ModelSize` says as ``linear`` and ``in_linear``."""
    from dspy_fst.engine.lora_layers import linear_layers, sides  # imports peft, which takes a second

    widths: Counter[str] = Counter()
    rounded = 0
    for name in linear_layers(model):
        layer = model.get_submodule(name)
        widths[name.rpartition(".")[2]] += sum(sides(layer))
        rounded += math.prod(sides(layer)) if hasattr(layer, "in_features") else 0  # a Conv1D is not rounded
    return tuple(sorted(widths.items())), rounded


def _inner_width(config: "PreTrainedConfig") -> int | None:
    """Inner width of a layer; for a mixture of experts, of all experts that a token passes through."""
    dense, expert = largest(config, "intermediate_size"), largest(config, "moe_intermediate_size")
    chosen = largest(config, "num_experts_per_tok") or 1
    return max(filter(None, (dense, expert and expert * chosen)), default=None)
