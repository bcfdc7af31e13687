"""Constants of an update that its memory depends on; `dspy_fst.memory` counts with them. Numbers alone."""

CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**26}
"""Logits that are computed at once, by type of device: enough tokens for a fast matrix product.

Measured on a CPU, assumed on a GPU. They are constants, because another size may change an update's last bits."""
CHUNK_TENSORS, CHUNK_TENSORS_WITHOUT_KL = 8, 4
"""Tensors of that size that exist at once, with a KL and without (counted by a test)."""
BLOCK_ROWS = 8192
"""Rows of a head's weight that are converted to float32, or get their gradient, at once."""
