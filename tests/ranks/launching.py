"""Starts Python processes as the ranks of one launch."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dspy_fst.engine.machine import free_port, without_launcher

ROOT = Path(__file__).parents[2]
SECONDS = 240.0
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def by_torchrun(*command: object, ranks: int = 2, **variables: str) -> subprocess.CompletedProcess[str]:
    """``torchrun COMMAND``, ended."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*torchrun, *map(str, command)],
        env={**without_launcher(os.environ), **ENVIRONMENT, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )


def by_hand(*command: object, ranks: int = 2, **variables: str) -> list[tuple[int, str]]:
    """Status and output of each rank; nobody ends the others when one fails."""
    told = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port("127.0.0.1"))}
    started = [
        _started(command, {**told, "RANK": str(rank), "LOCAL_RANK": str(rank), **variables}) for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def _started(command: Sequence[object], variables: Mapping[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env={**without_launcher(os.environ), **ENVIRONMENT, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
