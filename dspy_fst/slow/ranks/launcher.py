"""What torchrun's agent is to the ranks, in the process that is rank 0: a store, and variables that lead there."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress

import torch.distributed as dist

from dspy_fst.engine.machine import Launch
from dspy_fst.errors import RankError, briefly
from dspy_fst.run.interrupts import Terminated, signals_ignored
from dspy_fst.run.settling import settle_in_thread
from dspy_fst.slow.ranks.ranks import Ranks
from dspy_fst.slow.ranks.several import SeveralRanks, end_before_first_call

MEET_S = 120.0
"""How long ranks that all run may take to find each other (ours); gloo itself waits for half an hour."""
END_S = 5.0
"""How long their meeting may take to end once its store is gone (ours)."""


class Launcher:
    """Rank 0 of ranks that this process has started elsewhere. Its store lives until this object is let go of.

    Args:
        host: Address of this machine, as the other ranks reach it.
        world: Number of all ranks.
    """

    def __init__(self, host: str, world: int):
        self._world = world
        store = dist.TCPStore(host, 0, world, is_master=True, wait_for_workers=False)  # at a port that is free
        self._store: dist.TCPStore | None = store
        self._place = {"MASTER_ADDR": host, "MASTER_PORT": str(store.port)}

    def variables(self, rank: int) -> dict[str, str]:
        """torchrun's variables for one rank, which sees its own card alone."""
        return {
            **{**self._place, "WORLD_SIZE": str(self._world)},
            **{"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"},
        }

    @contextmanager
    def leading(self, lost: Sequence[str]) -> Iterator[Ranks]:
        """The block in which this process leads the others, which have been told to obey; they end with it.

        Args:
            lost: Which other ranks are gone, in words. Where one is, a SIGTERM that this process gets is of its end.

        Raises:
            RankError: another rank failed or died, or they do not find each other.
        """
        with _environment(self.variables(0)):  # what the user's program starts shall not take itself for a rank
            group = self._met(lost)
        group.told = lambda: lost
        try:
            with group.naming_lost():
                yield group
        finally:
            group.end()

    def give_up(self) -> None:
        """Let ranks end that wait for others, or for a first call which does not come."""
        if self._store is not None:
            with suppress(RuntimeError):
                end_before_first_call(self._store)

    def _met(self, lost: Sequence[str]) -> SeveralRanks:
        """The ranks, once they have found each other: in a thread, as gloo hears no signal while it waits for one.

        Raises:
            RankError: as `leading` has it.
        """
        meeting: Future[SeveralRanks] = Future()
        thread = settle_in_thread(meeting, lambda: SeveralRanks(Launch.of()), "ranks-meet")
        try:
            return meeting.result(MEET_S)
        except (RankError, RuntimeError, TimeoutError, Terminated) as error:
            if isinstance(error, Terminated) and not lost:
                raise
            with suppress(Terminated):
                signals_ignored()  # that of a lost rank would stand for what is told of it
            self._store = None  # the thread ends with it, and this process can meet others later
            thread.join(END_S)
            why = "; ".join(lost) or f"after {MEET_S:g} s at most: {briefly(error)}"
            raise RankError(
                f"the ranks did not find each other: {why}. On nodes with several networks set GLOO_SOCKET_IFNAME and "
                "NCCL_SOCKET_IFNAME for `ray start`"
            ) from error


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
