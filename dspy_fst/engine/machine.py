"""What this process runs on: CUDA devices, as torch sees them, how many processes, and ports for a server."""

import ipaddress
import logging
import os
import socket
from collections.abc import Mapping

logger = logging.getLogger(__name__)

PROCESS_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which torchrun, accelerate launch and the MPI launchers say how many processes they started."""


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


def empty_gpu_cache() -> None:
    """Give the memory that torch keeps for later tensors of this process back to the card, for other processes.

    A failure is logged alone: CUDA's errors come again at every later call, and this one would cover the first.
    """
    if has_gpu():
        import torch

        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:
            logger.warning("torch did not give back the GPU memory that it leaves unused: %s", error)


def free_second_gpu_bytes() -> int | None:
    """Free bytes of the second CUDA device; None with fewer than two."""
    if not has_gpu():
        return None
    import torch

    return torch.cuda.mem_get_info(1)[0] if torch.cuda.device_count() > 1 else None


def launch_faults(environment: Mapping[str, str] = os.environ) -> list[str]:
    """One sentence for each variable that announces several processes: each would train weights of its own.

    The trainer reads no settings from the environment, so other variables of `accelerate launch` do no harm.
    """
    return [
        "the trainer updates in one process; launch it without torchrun or accelerate launch "
        f"({name}={environment[name]})"
        for name in PROCESS_COUNTS
        if environment.get(name, "").isdecimal() and int(environment[name]) > 1
    ]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host, e.g. ``"127.0.0.1"``, ``"[::1]"`` or ``"localhost"``."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def free_port(host: str) -> int:
    """A port that is free now. It is not reserved, so another program may take it."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def port_taken(host: str, port: int) -> bool:
    """Whether binding the port fails now, as it would for a server."""
    with socket.socket() as probe:
        # Servers set this option, too: a port in TIME_WAIT is free to them, one with a listener is not.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError):  # the latter: the number is not a port
            return True
    return False
