"""What every part does in its own process: load while the part before it works, wait for its turn, write rows."""

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS, WAITS = "GPU_CHECK_ROWS", "GPU_CHECK_WAITS"
"""Environment variables: the file for the rows; whether a line on standard input begins the part's turn."""


def row(**values: Any) -> None:
    """Hand one row of the part's table to the command; it is kept when the part fails later."""
    line = json.dumps(values)
    if path := os.environ.get(ROWS):
        with Path(path).open("a") as file:
            file.write(line + "\n")
    print(line, flush=True)


def wait_for_turn() -> float | None:
    """Return when the GPU is this part's; before, a part imports and prepares files.

    Returns:
        Seconds that the part has from now on; None where nobody sets a limit.
    """
    return float(sys.stdin.readline() or 0) if os.environ.get(WAITS) else None


def reason_of(error: BaseException) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


def attempt(what: Callable[[], None], **names: Any) -> None:
    """Do it; an error becomes a row that says so, and the part goes on."""
    try:
        what()
    except Exception as error:  # whatever the libraries of another machine raise
        row(**names, skipped=reason_of(error))


def free() -> None:
    """Give the GPU's unused memory back."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
