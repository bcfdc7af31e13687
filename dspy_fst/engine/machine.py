"""What this process runs on: CUDA devices, as torch sees them, how many processes, and ports for a server."""

import ipaddress
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dspy_fst.errors import EngineError

logger = logging.getLogger(__name__)

PROCESS_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which torchrun, accelerate launch and the MPI launchers say how many processes they started."""
OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables of torchrun and accelerate launch by which the processes find each other (torch.distributed)."""

OF_LAUNCHERS = (*OF_TORCHRUN, *PROCESS_COUNTS, "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "TORCHELASTIC_")
"""Beginnings of the variables by which a process knows that it was launched with others."""
OTHER_TRAINERS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_FSDP": "its FSDP plugin",
}
"""Variable of accelerate launch -> what it would train with."""


def has_gpu() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def gpu_count() -> int:
    """How many CUDA devices torch sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def visible_devices(cards: Sequence[int], environment: Mapping[str, str] = os.environ) -> str:
    """``CUDA_VISIBLE_DEVICES`` with which another process sees these cards only.

    Args:
        cards: As torch numbers them in this process.
        environment: Of this process, which may see a part of the machine's cards.

    >>> visible_devices([1, 2], {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}), visible_devices([1, 2], {})
    ('5,6', '1,2')
    """
    seen = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return ",".join(seen[card].strip() if seen != [""] else str(card) for card in cards)


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


@dataclass(frozen=True)
class Launch:
    """Which of several processes this one is.

    >>> Launch.of({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"})
    Launch(rank=1, world=2, local_rank=1)
    >>> Launch.of({})
    Launch(rank=0, world=1, local_rank=0)
    """

    rank: int = 0
    """Of 0 to ``world - 1``, over all machines."""
    world: int = 1
    """Number of processes."""
    local_rank: int = 0
    """On this machine: the number of its GPU."""

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> "Launch":
        """As torchrun or accelerate launch told it; a process alone where nobody did."""
        numbers = [environment.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
        if not all(map(str.isdecimal, numbers)) or int(numbers[1]) < 2:
            return cls()
        return cls(*map(int, numbers))


def _announced(environment: Mapping[str, str]) -> str:
    """The variables that announce several processes, e.g. ``"WORLD_SIZE=2"``; empty for a process alone."""
    counts = {name: environment.get(name, "") for name in PROCESS_COUNTS}
    return ", ".join(f"{name}={count}" for name, count in counts.items() if count.isdecimal() and int(count) > 1)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process alone, for a server that this process starts."""
    return {name: value for name, value in environment.items() if not name.startswith(OF_LAUNCHERS)}


def require_first_rank() -> None:
    """
    Raises:
        EngineError: this process is another rank than 0, and engines run on rank 0.
    """
    if rank := Launch.of().rank:
        raise EngineError(
            f"this process is rank {rank} of several, and the engine runs on rank 0 alone: the LM answers there. Call "
            "the program after compile(), which only rank 0 returns from, or where the variable RANK is 0"
        )


def several_fault(environment: Mapping[str, str] = os.environ) -> str | None:
    """Why a process may not train by itself, in a sentence: it was launched with others, each of which would train
    weights of its own."""
    if not (counts := _announced(environment)):
        return None
    return (
        f"this process is one of several that were launched together ({counts}), and these weights are trained by one "
        "alone; launch it without torchrun or accelerate launch (in FSTOptimizer.compile and dspy-fst run all train)"
    )


def launch_faults(environment: Mapping[str, str] = os.environ) -> list[str]:
    """A sentence where a launcher announces several processes which a run cannot train with."""
    if not (counts := _announced(environment)):
        return []
    if missing := [name for name in OF_TORCHRUN if not environment.get(name)]:
        return [
            f"this process was launched as one of several ({counts}), and {', '.join(missing)} are not set; launch it "
            "with torchrun or accelerate launch, or alone"
        ]
    here, cards = environment.get("LOCAL_WORLD_SIZE", ""), gpu_count()
    if here.isdecimal() and 0 < cards < int(here):
        return [
            f"{here} processes were launched on this machine (LOCAL_WORLD_SIZE), and torch sees {cards} cards: each "
            f"needs one of its own; launch {cards} (torchrun --nproc-per-node {cards})"
        ]
    return [
        f"{name}={environment[name]}: accelerate launch was told to train with {engine}, which a run does not use; "
        f"launch it with torchrun, or with a config of accelerate without it"
        for name, engine in OTHER_TRAINERS.items()
        if environment.get(name, "").lower() in ("1", "true")
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
