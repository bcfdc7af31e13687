"""CUDA devices of this machine, as torch sees them."""


def has_gpu() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def free_gpu_bytes() -> tuple[int, int] | None:
    """(free, total) bytes of the first CUDA device; None if there is none."""
    if not has_gpu():
        return None
    import torch

    free, total = torch.cuda.mem_get_info()
    return free, total


def free_second_gpu_bytes() -> int | None:
    """Free bytes of the second CUDA device; None with fewer than two."""
    if not has_gpu():
        return None
    import torch

    return torch.cuda.mem_get_info(1)[0] if torch.cuda.device_count() > 1 else None
