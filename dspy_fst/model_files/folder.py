"""What a model's folder holds that loaders read in silence as something else.

transformers makes up layers that the files lack, adds an adapter to weights that it was merged into, and takes one of
two sets of weights. Each of these trains or serves another model than its owner means, so it is told before any work.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dspy_fst.errors import briefly
from dspy_fst.model_files.architectures import load_model

ADAPTER = "adapter_config.json"
WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files of which any one tells of whole weights."""
ATTENTION = ("attn_implementation", "_attn_implementation")
KNOWN_ATTENTION = ("eager", "sdpa")
"""What runs wherever torch does; the kernels of others differ between trainer and engine, or are not there."""
WRAPPED = ("base_layer", "modules_to_save", "original_module", "parametrizations")
LORA = "lora_"
"""Names between two dots, or their beginning, that peft and torch's parametrizations give to tensors."""


def folder_faults(folder: Path) -> Iterator[str]:
    """Faults of a local folder's files, a sentence each; nothing is loaded."""
    whole = [name for name in WHOLE if (folder / name).is_file()]
    if (folder / ADAPTER).is_file() and whole:
        files = sorted(path.name for path in folder.glob("adapter_*"))
        yield (
            f"the folder holds whole weights ({', '.join(whole)}) and an adapter's files ({', '.join(files)}): with "
            "peft installed transformers adds the adapter to the weights, a second time if they are merged; move the "
            "adapter's files elsewhere, or merge it once and save the merged model in a new folder"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file() and (folder / "model.safetensors").is_file() and _names_others(index):
        yield (
            "the folder holds its weights twice, in model.safetensors and in the files that "
            "model.safetensors.index.json names: transformers reads the one and vLLM the others; remove those that are "
            "not meant"
        )
    yield from _attention_faults(_read(folder / "config.json"))


def _names_others(index: Path) -> bool:
    named = _read(index).get("weight_map")
    return isinstance(named, dict) and any(name != "model.safetensors" for name in named.values())


def _attention_faults(config: Mapping[str, Any]) -> Iterator[str]:
    for key in ATTENTION:
        if (asked := config.get(key)) and asked not in KNOWN_ATTENTION:
            yield (
                f"its config.json asks for {key}={asked!r}, and trainer and engine choose their attention themselves; "
                f"remove the line, or use one of {', '.join(map(repr, KNOWN_ATTENTION))}"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def layer_fault(told: Mapping[str, Any]) -> str | None:
    """What is at fault by transformers' loading info (``output_loading_info=True``); None when nothing is.

    transformers makes up what the files lack, and says so in its log only.
    """
    absent = sorted({str(key) for kind in ("missing_keys", "mismatched_keys") for key in told.get(kind) or ()})
    if not absent:
        return None
    shown = ", ".join(absent[:4]) + (f" and {len(absent) - 4} more" if len(absent) > 4 else "")
    return (
        f"its files lack {shown}, or hold them in another shape; transformers would fill them at random. Download or "
        "save the model again, or set tie_word_embeddings to true if the head is the embedding"
    )


def stored_layer_fault(folder: Path) -> str | None:
    """The same of a local folder before any work: its files' names and shapes against the model's, without numbers."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        _, told = load_model(folder, dtype="float32", device_map="meta", output_loading_info=True)
    except Exception as error:  # a model's own code may raise anything on a config that is not its files'
        if isinstance(error, OSError | MemoryError) or "Cannot allocate memory" in str(error):
            return None  # files larger than the memory; `fit` tells
        if "ignore_mismatched_sizes" in str(error):
            return (
                "its files hold some layers in another shape than its config.json says; they are of two models, or "
                "the config was edited: download or save the model again"
            )
        return (
            f"transformers cannot make its model ({type(error).__name__}: {briefly(error)}); "
            "look at its config.json, or download or save the model again"
        )
    finally:
        logging.set_verbosity(verbosity)
    return layer_fault(told)


def wrapped_names(names: Iterator[str]) -> list[str]:
    """Those names of tensors or modules that tell of an adapter or a parametrization."""
    return [name for name in names if any(part in WRAPPED or part.startswith(LORA) for part in name.split("."))]
