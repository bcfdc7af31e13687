"""Runs inside vLLM's workers: compares the LoRA adapters that the forward pass uses with published peft folders.

vLLM stacks the matrices of all active adapters, one slot for each, with the scaling multiplied into B. The folder is
read again by vLLM's own loader and put into blank stacks by each layer's own ``set_lora``. So the comparison with the
slot in use is exact, whatever a layer packs, transposes, pads or shards.

Workers know adapters by number. The numbers are given in another process, so each load is noted with its name. Read
from vLLM 0.32, `lora/worker_manager.py` and `lora/model_manager.py`. Imported only by `dspy_fst_weight_check`, whose
folder is on the server's PYTHONPATH.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from dspy_fst_weight_check import difference, digest  # type: ignore[import-not-found]
from safetensors import safe_open
from torch import Tensor, nn

NOTES = "dspy_fst_notes"
"""Attribute of vLLM's manager that holds our notes."""
STACKS = "_stacked"
"""End of the names of a layer's attributes that hold the matrices of all active adapters."""


class Notes:
    """Under which request each adapter was loaded last: name on the server -> vLLM's LoRARequest."""

    def __init__(self, manager: Any):
        self.requests: dict[str, Any] = {}
        self.read = manager._load_adapter
        """Reads an adapter's folder, without noting it."""

    def read_and_note(self, request: Any) -> Any:
        adapter = self.read(request)
        self.requests[request.lora_name] = request
        return adapter


def notes_of(manager: Any) -> Notes:
    """The notes about a worker's adapters; the first call, before any adapter is loaded, begins them."""
    notes: Notes | None = getattr(manager, NOTES, None)
    if notes is None:
        notes = Notes(manager)
        _leave_the_base_alone(manager)
        manager._load_adapter = notes.read_and_note
        setattr(manager, NOTES, notes)
    return notes


def _leave_the_base_alone(manager: Any) -> None:
    """Give the stacks of B an empty slot at the end, so that requests without an adapter get none.

    For such requests vLLM 0.32 gives the slot -1 to its CPU kernels (`lora/ops/torch_ops`). They index with it, so a
    request to the base, in one batch with others, would be computed with whatever adapter is in the last slot.
    """
    for layer in manager._adapter_manager.modules.values():
        if type(layer.punica_wrapper).__name__ == "PunicaWrapperCPU":
            padded = tuple(torch.cat([stack, torch.zeros_like(stack[:1])]) for stack in _as_tuple(layer.lora_b_stacked))
            layer.lora_b_stacked = padded if isinstance(layer.lora_b_stacked, tuple) else padded[0]


def forget(manager: Any, name: str) -> bool:
    """Free an adapter's memory; False if it is not loaded."""
    request = notes_of(manager).requests.pop(name, None)
    return request is not None and bool(manager.remove_adapter(request.lora_int_id))


@torch.no_grad()
def compare_adapter(manager: Any, name: str, folder: str) -> tuple[dict[str, str], dict[str, str]]:
    """Compare the adapter that requests for ``name`` use with a folder's.

    Returns:
        Digests of the folder's tensors, and tensor -> how what is in use differs, empty when all is right.
    """
    from vllm.lora.request import LoRARequest

    notes, layers = notes_of(manager), manager._adapter_manager
    request = notes.requests.get(name)
    digests = _digests(f"{folder}/adapter_model.safetensors")
    if request is None:
        return digests, dict.fromkeys(digests, f"no LoRA adapter was loaded as {name}")
    manager.add_adapter(request)  # as its next call would: it may have been evicted
    slot = layers.lora_index_to_id.index(request.lora_int_id)
    read = notes.read(LoRARequest(name, request.lora_int_id, folder))
    origins = _origins(layers, digests)
    layers._create_merged_loras_inplace(read)
    return digests, _wrong(layers, slot, read, origins)


def _digests(file: str) -> dict[str, str]:
    with safe_open(file, framework="pt") as tensors:
        return {name: digest(tensors.get_tensor(name)) for name in tensors.keys()}  # noqa: SIM118 - not a mapping


Origins = dict[str, list[tuple[str, bool]]]
"""Name of a layer, or of a part of a packed one -> the folder's tensors for it, and whether each is an A."""


def _origins(layers: Any, names: Iterable[str]) -> Origins:
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = getattr(layers.model, "hf_to_vllm_mapper", None)
    mapper = mapper.get_rename_mapper() if mapper is not None else None
    origins: Origins = {}
    for name in names:
        part, is_a = parse_fine_tuned_lora_name(name, mapper)
        origins.setdefault(part, []).append((name, is_a))
    return origins


def _wrong(layers: Any, slot: int, read: Any, origins: Origins) -> dict[str, str]:
    wrong: dict[str, str] = {}
    for path, layer in layers.modules.items():
        parts = layers.packed_modules.get(path) or [path]
        tensors = [origins.pop(part, []) for part in parts]
        for is_a, place, how in _differences(layer, slot, layers._get_lora_layer_weights(read, path)):
            several = len(layer.lora_a_stacked) == len(parts) > 1
            suspects = tensors[place] if several else [tensor for part in tensors for tensor in part]
            named = [name for name, of_a in suspects if of_a == is_a]
            wrong |= dict.fromkeys(named or [f"{path} (no tensor of the folder)"], how)
    for part, unused in origins.items():
        wrong |= dict.fromkeys((name for name, _ in unused), f"no layer of the server takes LoRA on {part}")
    return wrong


def _differences(layer: nn.Module, slot: int, weights: Any) -> Iterator[tuple[bool, int, str]]:
    """How the matrices of the slot in use differ from what the layer makes of these weights.

    Yields:
        Whether it is an A, its place in its stack, and how it differs.
    """
    with _blank_stacks(layer) as live:
        if weights is not None:
            layer.set_lora(slot, weights.lora_a, weights.lora_b)  # type: ignore[operator]
        for name, stacks in live.items():
            for place, (used, wanted) in enumerate(zip(stacks, _as_tuple(getattr(layer, name)), strict=True)):
                if (how := difference(used[slot], wanted[slot])) is not None:
                    yield "lora_a" in name, place, how


@contextmanager
def _blank_stacks(layer: nn.Module) -> Iterator[dict[str, tuple[Tensor, ...]]]:
    """Replace a layer's stacks by blank ones in this block, and yield the live ones."""
    kept = {
        name: value
        for name, value in vars(layer).items()
        if name.endswith(STACKS) and isinstance(value, Tensor | tuple)
    }
    try:
        for name, value in kept.items():
            blank = tuple(torch.zeros_like(stack) for stack in _as_tuple(value))
            vars(layer)[name] = blank if isinstance(value, tuple) else blank[0]
        yield {name: _as_tuple(value) for name, value in kept.items()}
    finally:
        vars(layer).update(kept)


def _as_tuple(stacks: Any) -> tuple[Tensor, ...]:
    return stacks if isinstance(stacks, tuple) else (stacks,)
