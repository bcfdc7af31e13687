"""Matrix products of float32 as float32, whatever the process allows otherwise."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCK = threading.Lock()
_inside = 0
_before = "highest"


@contextmanager
def exact_matmuls() -> Iterator[None]:
    """A block whose float32 products keep all 24 bits; the process's own setting is back at its end.

    ``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1`` (set in NVIDIA's containers) and `torch.set_float32_matmul_precision` let
    them round to TF32 or bfloat16: the float32 head would be one in name only. The setting is the process's, so
    blocks of several threads count as one.
    """
    global _inside, _before
    with _LOCK:
        if not _inside:
            _before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if not _inside:
                torch.set_float32_matmul_precision(_before)
