"""States of ranks that share the weights, written in the background by all of them at once.

In: each rank's share of a state; then, from rank 0, the folder. Out: the folder with the shares of all ranks, or an
error on rank 0 that names the rank which failed or is gone. At most one state is under way.

A rank begins in the midst of its calls, and goes on to make calls while a thread writes. So the thread has a group of
its own, and what it writes must not change before rank 0's call of `Save` has returned.
"""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from dspy_fst.errors import RankError
from dspy_fst.run.settling import settle_in_thread
from dspy_fst.run.state_writer import STATE_S
from dspy_fst.slow.ranks.parts import save_parts

LOOK_S = 0.2
"""How often a thread looks for rank 0's word, and whether a rank is gone (ours)."""
LAST_S = 3.0
"""How long gloo may take to notice that a rank is gone (ours). A thread that it wakes while the process ends would
abort that: Python ends threads that come back from C++ by an exception which C++ does not let through."""
NOT_WRITTEN = (
    "{gone}, so the state is not written. What was committed is whole, and the same command goes on from there"
)


class _State:
    """One state on its way."""

    def __init__(self, number: int, tensors: Mapping[str, Tensor]):
        self.key, self.tensors = f"state/{number}", tensors
        self.begins = threading.Lock()
        """Taken by who is first on rank 0: the one who writes the state, or the one who gives it up."""
        self.written: Future[None] = Future()


class PartsWriter:
    """What one rank has of it.

    Args:
        rank: Which.
        store: Of all ranks.
        gone: Which other ranks have failed or died, as far as is known at once; None: none.
        lost: The same after a connection was lost; waits for what they say.
    """

    def __init__(self, rank: int, store: dist.Store, gone: Callable[[], str | None], lost: Callable[[], str | None]):
        self._rank, self._store, self._gone, self._lost = rank, store, gone, lost
        self._group = self._met()
        self._states, self._last = 0, _State(0, {})
        self._last.written.set_result(None)

    def _met(self) -> dist.ProcessGroup:
        """A group of all ranks. Gloo hears of none that is gone before it has made one, so they come together before.

        Raises:
            RankError: a rank is gone.
        """
        come = [f"writes/{rank}" for rank in range(dist.get_world_size())]
        self._store.set(come[self._rank], "")

        def have_come() -> bool:
            if here := self._store.check(come):
                return here
            time.sleep(LOOK_S)
            return False

        if (gone := self._gone_before(have_come)) is not None:
            raise RankError(NOT_WRITTEN.format(gone=gone))
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=STATE_S))

    def begin(self, tensors: Mapping[str, Tensor]) -> Callable[[Path], None]:
        """A call of all ranks. It waits for the state before, on every rank.

        Args:
            tensors: This rank's share. Of what is not shared rank 0's is written.

        Returns:
            Writes the state into an existing folder, as `save_parts` has it; for rank 0, in any thread.
        """
        self.settle()
        self._states += 1
        state = self._last = _State(self._states, tensors)
        if self._rank:
            settle_in_thread(state.written, partial(self._write_when_told, state), "state")
        return partial(self._write, state)

    def settle(self) -> None:
        """Wait for the last state, as long as no rank is gone. One that rank 0 has not begun to write is given up."""
        state = self._last
        if not self._rank and not state.written.done() and state.begins.acquire(blocking=False):
            state.written.set_result(None)  # first: without a store there is nobody to tell, and nobody to wait for
            self._store.set(state.key, "")
        with suppress(RankError):
            self._wait(state)

    def end(self) -> None:
        """Let go of the group; `settle` comes before."""
        dist.destroy_process_group(self._group)

    def _write(self, state: _State, folder: Path) -> None:
        """
        Raises:
            RankError: a rank is gone, or the state was given up.
        """
        if not state.begins.acquire(blocking=False):
            raise RankError("the run is over, so the state is not written")

        def tell_and_save() -> None:
            self._store.set(state.key, str(folder.absolute()))
            save_parts(state.tensors, folder, self._group)

        settle_in_thread(state.written, tell_and_save, "state-part")
        self._wait(state)
        try:
            state.written.result()
        except RuntimeError as error:  # gloo or the store lost a connection
            if (gone := self._lost()) is None:
                raise
            raise RankError(NOT_WRITTEN.format(gone=gone)) from error

    def _wait(self, state: _State) -> None:
        """
        Raises:
            RankError: a rank is gone.
        """
        gone = self._gone_before(lambda: bool(wait([state.written], LOOK_S).done))
        if gone is not None:  # who waits for a rank that waits for a lost one would not hear of it
            wait([state.written], LAST_S)
            raise RankError(NOT_WRITTEN.format(gone=gone))

    def _gone_before(self, is_done: Callable[[], bool]) -> str | None:
        """Looks until something is done, which is asked again and again and takes a while each time.

        Returns:
            Which ranks are gone meanwhile, in words; None: none, and it is done.
        """
        until = time.monotonic() + STATE_S
        while not is_done():
            gone = self._gone() or (f"no rank ended within {STATE_S:g} s" if time.monotonic() > until else None)
            if gone is not None:
                return gone
        return None

    def _write_when_told(self, state: _State) -> None:
        """Another rank's part, once rank 0 has a folder for it; nothing where rank 0 gives the state up."""
        while not self._store.check([state.key]):
            time.sleep(LOOK_S)
        if folder := self._store.get(state.key).decode():
            save_parts(state.tensors, Path(folder), self._group)
