"""LoRA adapters with random matrices on the model of `tiny_qwen`, made by peft."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from dspy_fst.engine.base import AdapterFiles
from dspy_fst.engine.vllm.served.dspy_fst_weight_check import digest
from dspy_fst.model_files.lora_folder import TENSORS
from tests.engine.tiny_qwen import make_model

PLAIN: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


def make_adapter(folder: Path, name: str, seed: int, **config: Any) -> tuple[AdapterFiles, PeftModel]:
    """An adapter on ``make_model(0)`` in a folder of its name, and the model that it makes of it."""
    model = get_peft_model(make_model(0), LoraConfig(**{**PLAIN, **config}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder / name)
    return AdapterFiles(name, folder / name, digests_of(folder / name)), model.eval()


def digests_of(folder: Path) -> dict[str, str]:
    """Of every tensor of an adapter's folder."""
    return {tensor_name: digest(tensor) for tensor_name, tensor in load_file(folder / TENSORS).items()}


def alter(folder: Path, tensor_name: str) -> None:
    """Change one number of one tensor of an adapter's folder by the least that its type can hold."""
    tensors = load_file(folder / TENSORS)
    flat = tensors[tensor_name].view(-1)
    flat[flat.numel() // 2] = torch.nextafter(flat[flat.numel() // 2], torch.tensor(1e9))
    save_file(tensors, folder / TENSORS, {"format": "pt"})
