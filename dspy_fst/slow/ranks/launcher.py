"""What torchrun's agent is to the ranks, in the process that is rank 0: a store, and variables that lead there."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist

from dspy_fst.engine.machine import Launch
from dspy_fst.slow.ranks.ranks import Ranks
from dspy_fst.slow.ranks.several import SeveralRanks


class Launcher:
    """Rank 0 of ranks that this process has started elsewhere. Its store lives until this object is let go of.

    Args:
        host: Address of this machine, as the other ranks reach it.
        world: Number of all ranks.
    """

    def __init__(self, host: str, world: int):
        self._world = world
        self._store = dist.TCPStore(host, 0, world, is_master=True, wait_for_workers=False)  # at a port that is free
        self._host = host

    def variables(self, rank: int) -> dict[str, str]:
        """torchrun's variables for one rank, which sees its own card alone."""
        return {
            **{"MASTER_ADDR": self._host, "MASTER_PORT": str(self._store.port), "WORLD_SIZE": str(self._world)},
            **{"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"},
        }

    @contextmanager
    def leading(self, signalled: Callable[[], bool]) -> Iterator[Ranks]:
        """The block in which this process leads the others, which have been told to obey; they end with it.

        Args:
            signalled: Whether a SIGTERM that this process gets is of another rank's end.

        Raises:
            RankError: another rank failed or died.
        """
        with _environment(self.variables(0)):  # what the user's program starts shall not take itself for a rank
            group = SeveralRanks(Launch.of())
        group.signalled = signalled
        try:
            with group.naming_lost():
                yield group
        finally:
            group.end()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """The block in which this process has these variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
