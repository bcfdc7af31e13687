"""Compares the weights of a transformers model in this process with a folder, and puts its LM head in float32.

A loaded model's tensors may be renamed and fused (e.g. experts), so they are compared under the folder's names. Read
from transformers 5.19 (`core_model_loading.revert_weight_conversion`).
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dspy_fst.engine.base import AdapterFiles, Holding
from dspy_fst.engine.lora import base_state, parameters_of
from dspy_fst.engine.vllm.served.dspy_fst_weight_check import difference, digest
from dspy_fst.model_files.lora_folder import TENSORS


@torch.no_grad()
def compare(model: PreTrainedModel, folder: Path) -> Holding:
    """Compare every tensor of a loaded model with the folder's, number by number; LoRA adapters on it are left out.

    Raises:
        OSError, SafetensorError: the folder cannot be read.
    """
    used = revert_weight_conversion(model, base_state(model))
    digests: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                wanted = tensors.get_tensor(name)
                digests[name] = digest(wanted)
                how = difference(used[name], wanted) if name in used else "the model has no such tensor"
                if how is not None:
                    wrong[name] = how
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    wrong |= dict.fromkeys(used.keys() - digests.keys() - tied, "not in the folder")
    return Holding(digests, wrong, str(model.dtype).removeprefix("torch."))


@torch.no_grad()
def compare_adapters(model: PreTrainedModel, adapters: Iterable[AdapterFiles]) -> Holding:
    """Compare every tensor of the LoRA adapters on a loaded model with their folders', number by number.

    Raises:
        OSError, SafetensorError: a folder cannot be read.
    """
    digests: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for adapter in adapters:
        used = parameters_of(model, adapter.name)
        with safe_open(adapter.path / TENSORS, framework="pt") as tensors:
            read = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a mapping
        digests |= {adapter.tensor(name): digest(tensor) for name, tensor in read.items()}
        differing = {name: difference(used[name], read[name]) for name in used.keys() & read.keys()}
        wrong |= {adapter.tensor(name): how for name, how in differing.items() if how is not None}
        wrong |= {adapter.tensor(name): "the model has no such tensor" for name in read.keys() - used.keys()}
        wrong |= {adapter.tensor(name): "not in the folder" for name in used.keys() - read.keys()}
    return Holding(digests, wrong, str(model.dtype).removeprefix("torch."), with_base=False)


@torch.no_grad()
def head_in_float32(model: PreTrainedModel, folder: Path) -> None:
    """Make the LM head hold the folder's numbers in float32 and compute in float32, as the trainer's head does.

    A model with tied embeddings gets a separate head; its embedding keeps the precision of the body.
    """
    head = model.get_output_embeddings()
    if head is None or head.weight.dtype == torch.float32:
        return
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, parameter in list(head.named_parameters(recurse=False)):
        exact = _read(folder, revert_weight_conversion(model, {names[id(parameter)]: parameter}))
        number = parameter.detach().float()
        setattr(head, name, nn.Parameter(number if exact is None else exact.to(number), requires_grad=False))
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))


def _read(folder: Path, names: Iterable[str]) -> torch.Tensor | None:
    """The first of these tensors that the folder holds; None if it holds none of them."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in set(names) & set(tensors.keys()):
                tensor: torch.Tensor = tensors.get_tensor(name)
                return tensor
    return None
