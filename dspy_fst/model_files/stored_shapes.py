"""The shapes of a model's stored tensors, read from the headers of its safetensors files."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a model's safetensors files, from their headers; empty when there are none.

    Raises:
        ValueError: a file is missing, cut off, or not what its name says; the message names it.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="numpy") as stored:
                shapes |= {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path.name}: {error}") from error
    return shapes


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read: one file, or those that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index.name}: no index of weights ({error!r})") from error
    return [folder / name for name in sorted(names)]
