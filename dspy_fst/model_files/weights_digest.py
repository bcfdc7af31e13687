"""One checksum for all numbers of a model, so that a LoRA adapter can name the base that it was trained on.

The checksum does not depend on how the numbers are laid out: files, order, names, and a tied head that is stored twice.
Other precisions have other checksums.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from dspy_fst.model_files.folder import weight_files

PIECE = 2**24
"""Bytes that are read at once."""


def weights_digest(folder: Path | str) -> str:
    """SHA-256 over the sorted digests of a folder's different tensors; each is over type, shape and bytes.

    Raises:
        ValueError: there are no safetensors files, or one is damaged.
    """
    try:
        tensors = {digest for path in weight_files(Path(folder)) for digest in _tensors_in(path)}
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: its safetensors files cannot be read: {error}") from error
    if not tensors:
        raise ValueError(f"{folder} holds no safetensors files")
    return hashlib.sha256("\n".join(sorted(tensors)).encode()).hexdigest()


def _tensors_in(path: Path) -> Iterator[str]:
    """The digest of each tensor. The file begins with the header's length (8 bytes, little-endian) and the header, in
    JSON; the tensors' places count from its end."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, facts in header.items():
            if name == "__metadata__":
                continue
            begin, end = facts["data_offsets"]
            file.seek(8 + length + begin)
            hashed = hashlib.sha256(f"{facts['dtype']} {facts['shape']} ".encode())
            for left in range(end - begin, 0, -PIECE):
                hashed.update(file.read(min(left, PIECE)))
            yield hashed.hexdigest()
