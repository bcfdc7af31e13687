"""Large tensors on a CPU get memory of their own, which goes back to the system as soon as they are freed.

Only where layers are computed again: elsewhere what is kept is far more than what holes cost, and mapping takes time.

In: nothing. Out: glibc's allocator is set for the rest of the process, or left as it is elsewhere.
"""

import ctypes
import os
import sys
from functools import cache

M_MMAP_THRESHOLD = -3
"""glibc's name of the parameter (malloc.h)."""
MAPPED_BYTES = 2**22
"""Memory of this size and more is mapped by itself (measured: with 1 MiB, 14 % of an update is for
new pages; with this, 6 %)."""
OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "glibc.malloc.mmap_threshold")
"""How a user sets the same parameter from outside; then it is left alone."""


@cache
def map_large_tensors() -> bool:
    """Fix the size from which glibc maps memory by itself. Does nothing under another C library.

    By default glibc raises that size to the largest piece that was ever freed, up to 32 MiB. Then the logits of a chunk
    and what a layer computes lie in one heap between tensors that stay, and their holes never go back to the system.

    Returns:
        Whether it was set.
    """
    if any(name in os.environ or name in os.environ.get("GLIBC_TUNABLES", "") for name in OWN_SETTINGS):
        return False
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES))
