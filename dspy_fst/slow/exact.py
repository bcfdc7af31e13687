"""Computes float32 matrix products in full float32, whatever precision the process allows elsewhere."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCK = threading.Lock()
_inside = 0
_before = "highest"


@contextmanager
def exact_matmuls() -> Iterator[None]:
    """A block in which float32 products keep all 24 bits. The process's own setting is restored at its end.

    ``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1`` (set in NVIDIA's containers) and `torch.set_float32_matmul_precision` allow
    rounding to TF32 or bfloat16. The float32 LM head would then be float32 in name only. The setting belongs to the
    whole process, so it is restored when the last of several concurrent blocks ends.
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
