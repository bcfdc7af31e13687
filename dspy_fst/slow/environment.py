"""Refuses a launch with several processes: the trainer updates in one process, on one device.

The trainer reads no settings from the environment, so other variables of `accelerate launch` do no harm. Several
processes would each train weights of their own.
"""

import os
from collections.abc import Mapping

PROCESS_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which torchrun, accelerate launch and the MPI launchers say how many processes they started."""


def environment_faults(environment: Mapping[str, str] = os.environ) -> list[str]:
    """One sentence for each variable that announces several processes."""
    return [
        "the trainer updates in one process; launch it without torchrun or accelerate launch "
        f"({name}={environment[name]})"
        for name in PROCESS_COUNTS
        if environment.get(name, "").isdecimal() and int(environment[name]) > 1
    ]
