"""A model's folder: faults that loaders pass over in silence, and the shapes of its stored tensors.

transformers initialises missing layers at random, adds an adapter to weights that it may already be merged into, and
reads one of two sets of weights. Each would train or serve another model than the user means, so it is reported before
any work.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dspy_fst.errors import briefly
from dspy_fst.model_files.architectures import load_model_with_info

ADAPTER = "adapter_config.json"
WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files that hold whole weights, or an index of them."""
ATTENTION = ("attn_implementation", "_attn_implementation")
KNOWN_ATTENTION = ("eager", "sdpa")
"""Implementations that run wherever torch does. Others differ between trainer and engine, or may be missing."""
WRAPPED = ("base_layer", "modules_to_save", "original_module", "parametrizations")
LORA = "lora_"
"""Parts of a dotted tensor name, or a prefix of one, that peft and torch's parametrizations add."""


def folder_faults(folder: Path) -> Iterator[str]:
    """Faults of a local folder's files, one sentence each; nothing is loaded."""
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
    yield from _attention_faults(read_object(folder / "config.json"))


def _names_others(index: Path) -> bool:
    named = read_object(index).get("weight_map")
    return isinstance(named, dict) and any(name != "model.safetensors" for name in named.values())


def _attention_faults(config: Mapping[str, object]) -> Iterator[str]:
    for key in ATTENTION:
        if (value := config.get(key)) and value not in KNOWN_ATTENTION:
            yield (
                f"its config.json asks for {key}={value!r}, and trainer and engine choose their attention themselves; "
                f"remove the line, or use one of {', '.join(map(repr, KNOWN_ATTENTION))}"
            )


def read_object(path: Path) -> dict[str, object]:
    """The JSON object in a file; empty where there is no file, or it holds no JSON object."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def layer_fault(info: Mapping[str, Collection[object]]) -> str | None:
    """The fault that transformers' loading info tells (see `load_model_with_info`); None when there is none.

    transformers initialises missing layers at random, and reports it in its log only.
    """
    absent = sorted({str(key) for kind in ("missing_keys", "mismatched_keys") for key in info.get(kind) or ()})
    if not absent:
        return None
    names = ", ".join(absent[:4]) + (f" and {len(absent) - 4} more" if len(absent) > 4 else "")
    return (
        f"its files lack {names}, or hold them in another shape; transformers would fill them at random. Download or "
        "save the model again, or set tie_word_embeddings to true if the head is the embedding"
    )


def stored_layer_fault(folder: Path) -> str | None:
    """`layer_fault` of a local folder, from the names and shapes of its tensors; no numbers are read."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        _, info = load_model_with_info(folder, dtype="float32", device_map="meta")
    except Exception as error:  # a model's own code may raise anything on a config that does not fit its files
        if isinstance(error, OSError | MemoryError) or "Cannot allocate memory" in str(error):
            return None  # the files are larger than the memory, which the memory plan reports
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
    return layer_fault(info)


def wrapped_names(names: Iterator[str]) -> list[str]:
    """The names of tensors or modules that belong to an adapter or a parametrization."""
    return [name for name in names if any(part in WRAPPED or part.startswith(LORA) for part in name.split("."))]


def adapter_fault(folder: Path) -> str | None:
    """The fault of a folder that holds an adapter and no model; None for every other folder.

    A folder with both whole weights and an adapter's files is refused in `dspy_fst.model_files.folder`.
    """
    adapter_config = folder / ADAPTER
    if not adapter_config.is_file() or any((folder / name).is_file() for name in WHOLE):
        return None
    settings = read_object(adapter_config)
    kind = settings.get("peft_type") or "PEFT"
    base = settings.get("base_model_name_or_path")
    origin = f"of the model {base!r}" if base else "of a model that it does not name"
    target = repr(base) if base else "BASE"
    return (
        f"the folder holds a {kind} adapter {origin}, and no model; merge it into its base first and give the merged "
        f"folder: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({target}, dtype='float32'), "
        f"{str(folder)!r}).merge_and_unload().save_pretrained(FOLDER), and save the base's tokenizer beside it"
    )


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a model's safetensors files, from their headers; empty when there are none.

    Raises:
        ValueError: a file is missing, cut off, or not what its name says; the message names it.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="numpy") as stored:
                shapes |= {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path.name}: {error}") from error
    return shapes


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would read: one file, or those that the index names.

    Raises:
        ValueError: the index cannot be read.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index.name}: no index of weights ({error!r})") from error
    return [folder / name for name in sorted(names)]
