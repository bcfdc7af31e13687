"""What the slow step leaves on disk: published policies for engines, and training state to go on from.

Both appear whole or not at all: they are written beside their place, flushed to the disk, and renamed.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Read from transformers 5.19: undoes, on saving, the renaming and fusing that from_pretrained did.
from dspy_fst.errors import TrainingError

HEAD = "lm_head.weight"
STATE_FORMAT = 1


@contextmanager
def written_whole(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A scratch folder that becomes ``path`` when the block ends well and vanishes when it does not.

    Raises:
        TrainingError: ``path`` exists and ``replace`` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        scratch.chmod(0o755)
        yield scratch
        for file in (*scratch.iterdir(), scratch):
            _flush(file)
        if replace and path.exists():
            _retire(path)
        if path.exists():
            raise TrainingError(f"{path} exists already; published weights never change, choose another version")
        scratch.rename(path)
        _flush(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _retire(path: Path) -> None:
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    path.rename(old)
    shutil.rmtree(old)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
