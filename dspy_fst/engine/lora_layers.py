"""Which layers of a model may get a LoRA adapter, which ones a recipe asks for, and why its settings do not fit."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dspy_fst.errors import TrainingError, meant
from dspy_fst.model_files.architectures import has_experts, text_part
from dspy_fst.recipe.lora_settings import ALL_LINEAR, LoRA

if TYPE_CHECKING:
    pass

BASE_LAYER = ".base_layer"
NO_ADAPTER = "__base__"
"""peft's name for the base among ``adapter_names``."""
ROUTERS = {"gate", "router", "shared_expert_gate"}
"""Last parts of the names of linear layers that choose experts. An adapted router would change which experts learn."""
PAST_ADAPTERS = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}
"""Types of models whose fused kernels read the weight of `out_proj` itself, past an adapter. peft refuses it there."""


def target_modules(model: PreTrainedModel, lora: LoRA) -> list[str]:
    """Full names of the layers that get an adapter, in the model's order.

    Raises:
        TrainingError: see `target_faults`.
    """
    if faults := target_faults(model, lora):
        raise TrainingError("; ".join(faults))
    layers = adaptable_layers(model)
    return [layer for layer in layers if lora.target == ALL_LINEAR or any(_ends(layer, name) for name in lora.target)]


def target_faults(model: PreTrainedModel, lora: LoRA) -> list[str]:
    """Why these settings do not fit a model, one sentence for each reason; the model may be on the meta device."""
    layers = adaptable_layers(model)
    kind = model.config.model_type
    if not layers:
        return [f"adapter: a {kind!r} model has no linear layers that a LoRA adapter could go on; train all weights"]
    names = () if lora.target == ALL_LINEAR else lora.target
    ends = sorted({layer.rpartition(".")[2] for layer in layers})
    faults = [_fault(model, name, ends) for name in names if not any(_ends(layer, name) for layer in layers)]
    chosen = [layer for layer in layers if lora.target == ALL_LINEAR or any(_ends(layer, name) for name in names)]
    full = max((_full_rank(model, layer) for layer in chosen), default=lora.rank)
    if lora.rank > full:
        faults.append(
            f"adapter: rank={lora.rank} is above {full}, the full rank of this model's largest layer with an adapter; "
            "use a lower rank, such as 16, or train all weights"
        )
    return faults


def name_faults(names: Iterable[str]) -> list[str]:
    """A sentence on names of adapters that torch does not take for a module, one for all; and one on peft's name."""
    given = {*names}
    faults = [f"adapters: {NO_ADAPTER!r} is peft's name for the base; name the group otherwise"] * (NO_ADAPTER in given)
    if taken := sorted(name for name in given if hasattr(nn.ModuleDict(), name)):
        faults.append(f"adapters: {', '.join(map(repr, taken))} is a name of torch's own; name the group otherwise")
    return faults


def _full_rank(model: PreTrainedModel, layer: str) -> int:
    return min(sides(model.get_submodule(layer)))


def sides(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; not read off its weight's shape, which a quantized layer packs."""
    inputs, outputs = (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
    return int(inputs), int(outputs)  # type: ignore[arg-type]  # torch declares modules' attributes as unknown


def _ends(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


def _fault(model: PreTrainedModel, name: str, ends: list[str]) -> str:
    head = model.get_output_embeddings()
    if any(module is head and _ends(full, name) for full, module in model.named_modules()):
        tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
        why = "it shares its weight with the embedding" if tied else "the trainer computes the head by itself"
        return f"adapter: target={name!r} is the LM head, which gets no LoRA adapter ({why}); leave it out"
    return (
        f"adapter: target={name!r}: a {model.config.model_type!r} model has no linear layer of this name"
        f"{meant(name, ends) or ''}; it has {', '.join(ends)}"
    )


def adaptable_layers(model: PreTrainedModel) -> list[str]:
    """Full names of the layers that may get an adapter: `linear_layers`, without those whose adapter would be passed
    by."""
    passed_by = {"out_proj"} if model.config.model_type in PAST_ADAPTERS else set()
    return [name for name in linear_layers(model) if name.rpartition(".")[2] not in passed_by]


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Full names of the text part's linear layers, adapted or not; the LM head and routers of experts are left out."""
    text, head = text_part(model), model.get_output_embeddings()
    inside = {id(module) for module in text.modules()}
    routers = ROUTERS if has_experts(model.config) else set()
    return [
        name
        for name, module in model.named_modules()
        if id(module) in inside
        and module is not head
        and (isinstance(module, nn.Linear | Conv1D) or hasattr(module, "base_layer"))  # the latter is peft's
        if not name.endswith(BASE_LAYER) and ".lora_" not in name and name.rpartition(".")[2] not in routers
    ]
