"""Where processes that were launched together find each other, by the launcher's store, in a wait that hears signals.

torch.distributed waits in C++, for half an hour, and hears none. Rank 0 may come late, as it reads the project first.
"""

import os
import socket
import time

import torch.distributed as dist

from dspy_fst.engine.machine import Launch
from dspy_fst.errors import RankError, briefly

COME_S = 1800.0
"""How long a rank waits for the others (gloo's own limit)."""
LOOK_S = 0.05
"""How often it looks for them (ours)."""
GONE = (
    "the process that started the ranks, or the one that holds their store, has ended ({why}). All ranks end with it; "
    "what was committed is whole, and the same command goes on from there"
)


def launchers_store(launch: Launch) -> dist.TCPStore:
    """The store that all ranks share. Where the launcher holds none, it lives in rank 0, as long as this object does.

    Raises:
        RankError: it does not answer in time, or rank 0 cannot listen.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True) or dist.is_initialized()
    holds = launch.rank == 0 and not by_launcher
    if not holds:
        _reach(host, port, launch.rank)
    try:
        return dist.TCPStore(host, port, launch.world, holds, wait_for_workers=False, multi_tenant=holds)
    except RuntimeError as error:
        raise RankError(
            f"rank {launch.rank} finds no store at {host}:{port} ({briefly(error)}); launch with another MASTER_PORT"
        ) from error


def _reach(host: str, port: int, rank: int) -> None:
    until = time.monotonic() + COME_S
    while True:
        try:
            return socket.create_connection((host, port), timeout=1.0).close()
        except OSError as error:
            if time.monotonic() > until:
                raise RankError(
                    f"rank {rank} does not reach rank 0 at {host}:{port} within {COME_S:g} s ({briefly(error)}); look "
                    "at what the other ranks printed, and open ports between the machines"
                ) from error
        time.sleep(LOOK_S)


def wait_for_all(store: dist.Store, keys: list[str], given_up: str) -> bool:
    """
    Args:
        keys: One of each rank, which it sets when it has come.
        given_up: A key that rank 0 sets where it does not wait any longer.

    Returns:
        Whether they have come.

    Raises:
        RankError: some did not come in time, or the store is gone.
    """
    until = time.monotonic() + COME_S
    try:
        while not store.check(keys):
            if store.check([given_up]):
                return False
            if time.monotonic() > until:
                late = ", ".join(str(rank) for rank, key in enumerate(keys) if not store.check([key]))
                raise RankError(f"rank {late} did not come within {COME_S:g} s; look at what was printed there")
            time.sleep(LOOK_S)
    except RuntimeError as error:
        raise store_gone(error) from error
    return True


def store_gone(error: BaseException) -> RankError:
    """What a rank says that finds no store any more."""
    return RankError(GONE.format(why=briefly(error)))
