"""Models of known shapes with random weights, written in seconds; nothing is downloaded."""

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from dspy_fst.model_files.architectures import empty_model
from programs.lab import BASE

_QWEN3 = {"model_type": "qwen3", "vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        **{"model_type": "qwen3", "vocab_size": 594, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
    },
    "0.5B": {
        **{"model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864},
        **{"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    },
    "1.7B": {
        **_QWEN3,
        **{"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
        "tie_word_embeddings": True,
    },
    "4B": {
        **_QWEN3,
        **{"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
        "tie_word_embeddings": True,
    },
    "8B": {
        **_QWEN3,
        **{"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32},
        "tie_word_embeddings": False,
    },
}
"""Config of each size: those of Qwen2.5-0.5B and of Qwen3-1.7B, -4B and -8B (their config.json); "tiny" rehearses."""
DEVIATION = 0.02
"""Of the random weights; both families' initializer_range."""
_BLOCK = 2**24
"""Distinct random numbers; larger tensors repeat them. Speed and memory do not depend on the values."""


def config_of(shape: str) -> Any:
    """The transformers config of a shape."""
    settings = dict(SHAPES[shape])
    return AutoConfig.for_model(settings.pop("model_type"), **settings, max_position_embeddings=4096)


def parameters_of(shape: str) -> int:
    """How many parameters the shape has; a tied head counts once."""
    return sum(parameter.numel() for parameter in empty_model(config_of(shape)).parameters())


@contextmanager
def random_model(shape: str) -> Iterator[Path]:
    """A Hugging Face folder with bfloat16 weights and the laboratory's tokenizer, in memory where there is room."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 3 * parameters_of(shape)
    with tempfile.TemporaryDirectory(prefix=f"{shape}-", dir=memory if roomy else None) as folder:
        write_random(shape, Path(folder))
        yield Path(folder)


def write_random(shape: str, folder: Path) -> None:
    """Write the folder: config, tokenizer and ``model.safetensors``."""
    config = config_of(shape)
    config.dtype = torch.bfloat16
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)).mul_(DEVIATION).to(torch.bfloat16)
    tensors = {
        name: _tensor(name, tensor.shape, block, index)
        for index, (name, tensor) in enumerate(empty_model(config).state_dict().items())
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    config.architectures = [type(empty_model(config)).__name__]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _tensor(name: str, shape: torch.Size, block: torch.Tensor, index: int) -> torch.Tensor:
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    count = math.prod(shape)
    rolled = block.roll(7919 * index)  # so that no two tensors are equal
    return rolled.repeat(math.ceil(count / _BLOCK))[:count].reshape(shape).clone()
