"""What the process was launched with, held against what the trainer does: one process, one device.

The trainer reads no settings from the environment, and `accelerate launch` may leave there what it likes. Only several
processes are refused: each would train weights of its own.
"""

import os
from collections.abc import Mapping

PROCESS_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which torchrun, accelerate launch and the MPI launchers say how many processes they started."""


def environment_faults(environment: Mapping[str, str] = os.environ) -> list[str]:
    """A sentence for each variable that tells of several processes."""
    return [
        "the trainer updates in one process; launch it without torchrun or accelerate launch "
        f"({name}={environment[name]})"
        for name in PROCESS_COUNTS
        if environment.get(name, "").isdecimal() and int(environment[name]) > 1
    ]
