"""Several processes as one trainer, by torch.distributed.

Tensors go over the default group: NCCL between GPUs, else gloo. Calls, counts and outcomes are Python objects. They go
over gloo always, which notices at once when a process is gone; a NCCL call would wait.

The store (a key-value server of the launcher) says what comes next, and why a rank has left. A rank waits there as
long as rank 0 searches, and hears signals.
"""

import os
import pickle
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dspy_fst.engine.machine import Launch, has_gpu
from dspy_fst.errors import RankError, TrainingError, briefly, is_signal
from dspy_fst.run.interrupts import Terminated, ignored_to_the_end, signals_ignored
from dspy_fst.slow.ranks.meeting import launchers_store, store_gone, wait_for_all
from dspy_fst.slow.ranks.ranks import Ranks
from dspy_fst.slow.ranks.writing import PartsWriter

T = TypeVar("T")
END = "end"
FIRST_CALL = "call/1"
"""Where the store says what is called first; the numbers after it say the rest."""
FAILED = "!"
OF_GLOO = "gloo/"
"""Stands in gloo's errors: it names its source file (torch 2.13), e.g. ``gloo/transport/tcp/pair.cc``."""
SHORTEST_S, LONGEST_S = 0.001, 0.2
"""How often a rank looks for the next call: at first, and after a long wait (ours)."""
LAST_WORDS_S = 3.0
"""How long a rank that leaves has to say why (ours)."""
DIFFER = (
    "the ranks differ in the outcome of a call ({}). Look at what differs between them, e.g. folders that one machine "
    "does not see; what was committed is whole, and the same command goes on from there"
)
ATTEMPT = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
"""Variables of torchrun that tell its restarts apart; their store is the same."""


class SeveralRanks(Ranks):
    """This process and the others that were launched with it.

    Args:
        launch: Which of them this is.

    Raises:
        RankError: they do not meet.
        SystemExit: rank 0 has given them up (status 0).
    """

    def __init__(self, launch: Launch):
        self.rank, self.world, self._local_rank = launch.rank, launch.world, launch.local_rank
        self._mine = not dist.is_initialized()
        self._calls = 0
        self._parts: PartsWriter | None = None
        self._named: str | None = None
        """Which ranks are lost, once that was told."""
        self.told: Callable[[], Sequence[str]] | None = None
        """Which ranks the launcher knows to be lost, in words; None: it says so by SIGTERM alone."""
        if has_gpu():
            torch.cuda.set_device(launch.local_rank)
        self._store = _of_this_attempt(launchers_store(launch))
        self._store.set(f"process/{self.rank}", _place())
        keys = [f"process/{rank}" for rank in range(self.world)]
        if not wait_for_all(self._store, keys, FIRST_CALL):
            raise SystemExit(0)
        self._places = [self._store.get(key).decode() for key in keys]
        with self.naming_lost():
            self._control = self._connected()

    def _connected(self) -> dist.ProcessGroup:
        """A group of gloo of all ranks, and the default group where nobody has made one. The ranks are all there."""
        if self._mine:
            # Where this has failed before, torch has still counted it, and would look for the others by another name.
            dist.distributed_c10d._world.group_count = 0
            store, kind = dist.PrefixStore("group", self._store), "nccl" if has_gpu() else "gloo"
            dist.init_process_group(kind, store=store, rank=self.rank, world_size=self.world)
        try:
            return dist.new_group(backend="gloo")
        except RuntimeError:  # with NCCL it is here that the ranks meet
            if self._mine:
                dist.destroy_process_group()
            raise

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self._local_rank) if has_gpu() else torch.device("cpu")

    # ---- calls -----------------------------------------------------------------------------------

    @contextmanager
    def together(self, call: str, arguments: Sequence[object], options: Mapping[str, object]) -> Iterator[None]:
        """
        Raises:
            RankError: a rank failed where this one did not.
        """
        if self.rank == 0:
            self._tell(call, (arguments, options))
        failure: TrainingError | None = None
        try:
            yield
        except RankError:
            raise
        except TrainingError as error:  # the same on all ranks, which is verified
            failure = error
        outcomes = self._gather(None if failure is None else _last_line(failure), ended=True)
        if len(set(outcomes)) > 1:
            raise RankError(DIFFER.format(_listed(enumerate(outcomes))))
        if failure is not None:
            raise failure

    def _tell(self, call: str, content: object) -> None:
        self._calls += 1
        message = pickle.dumps(content)  # before the others wait for it
        self._store.set(f"call/{self._calls}", call)
        dist.broadcast_object_list([message], src=0, group=self._control)

    def hear(self) -> tuple[str, tuple[Sequence[object], Mapping[str, object]]]:
        """What rank 0 calls next, with its arguments; waits for it.

        Raises:
            RankError: the launcher is gone, or rank 0 where that holds the store.
        """
        self._calls += 1
        key = f"call/{self._calls}"
        pause = SHORTEST_S
        try:
            # Its wait() would not hear a signal, and logs each time that it gives up.
            while not self._store.check([key]):
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_S)
            call = self._store.get(key).decode()
        except RuntimeError as error:
            raise store_gone(error) from error
        if call == END:
            return END, ((), {})
        received: list[bytes] = [b""]
        dist.broadcast_object_list(received, src=0, group=self._control)
        return call, pickle.loads(received[0])

    def end(self) -> None:
        """Let the other ranks end, where they still listen; this process is alone from now on.

        A state that is being written is waited for."""
        with suppress(RuntimeError):  # the store may have gone with its launcher
            try:
                self._settle()
            finally:
                if self.rank == 0:
                    self._store.set(f"call/{self._calls + 1}", END)
        with suppress(RuntimeError):  # who still waits in a call of the group learns that this one is gone
            if self._parts is not None and not self._mine:
                self._parts.end()
            dist.destroy_process_group(None if self._mine else self._control)

    def _settle(self) -> None:
        if self._parts is not None:
            self._parts.settle()

    # ---- values ----------------------------------------------------------------------------------

    def share(self, items: Iterable[T]) -> Iterable[T]:
        return islice(items, self.rank, None, self.world)

    def gathered(self, what: T) -> list[T]:
        return self._gather(what, ended=False)

    def _gather(self, what: T, *, ended: bool) -> list[T]:
        """
        Args:
            what: This rank's value; where its call has ended, the outcome.

        Raises:
            RankError: some ranks' calls have ended while others are in their midst.
        """
        found: list[tuple[bool, T]] = [(ended, what)] * self.world
        dist.all_gather_object(found, (ended, what), group=self._control)
        if len({over for over, _ in found}) > 1:
            raise RankError(DIFFER.format(_listed((rank, own) for rank, (over, own) in enumerate(found) if over)))
        return [own for _, own in found]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        held = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        dist.all_reduce(held, dist.ReduceOp.MAX, group=self._control)
        waiting = []
        for parameter, somewhere in zip(parameters, held.tolist(), strict=True):
            if somewhere:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                waiting.append(dist.all_reduce(parameter.grad, async_op=True))
        for work in waiting:
            work.wait()

    def in_parts(self, tensors: Mapping[str, Tensor]) -> Callable[[Path], None]:
        self._parts = self._parts or PartsWriter(self.rank, self._store, self._gone, self._lost)
        return self._parts.begin(tensors)

    # ---- a rank that is gone ---------------------------------------------------------------------

    def leave(self, error: BaseException) -> None:
        """Tell rank 0 why this rank leaves: by an error of its own, or after another one's."""
        # Ray makes a plain SystemExit of the signal by which it ends a process, e.g. for lack of memory.
        after_another = isinstance(error, SystemExit) or OF_GLOO in str(error)
        with suppress(RuntimeError):
            if is_signal(error):  # of a run that ends with a whole state
                self._settle()
            self._store.set(f"left/{self.rank}", "later" if after_another else f"{FAILED}{_last_line(error)}")

    @contextmanager
    def naming_lost(self) -> Iterator[None]:
        """
        Raises:
            RankError: another rank failed or died, which this one saw as a lost connection or the launcher's SIGTERM;
                or the launcher is gone.
        """
        try:
            yield
        except (RuntimeError, Terminated) as error:
            of_the_user = isinstance(error, Terminated) and self.told is not None and not self.told()
            if of_the_user or (cause := self._cause_of(error)) is None:
                raise
            if self._named and self.told is None and all(name in os.environ for name in ATTEMPT):
                ignored_to_the_end()  # torchrun's signal may come late, and would end this process before it tells
            raise cause from error

    def _cause_of(self, error: BaseException) -> RankError | None:
        """What happened outside of this rank. The launcher's signal for it would break that off, and what is told."""
        while True:
            with suppress(Terminated):
                signals_ignored()
                if isinstance(error, RuntimeError) and self._without_store():
                    return store_gone(error)
                if (who := self._lost()) is None:
                    return None
                self._named = who
                return RankError(
                    f"{who}. All ranks end with it; what was committed is whole, and the same command goes on from "
                    "there"
                )

    def _lost(self) -> str | None:
        """Which ranks were the first to fail or die, in words; None if none is known to have."""
        until = time.monotonic() + LAST_WORDS_S
        while True:
            found, silent, left = self._known()
            if found or (found := [*self.told()] if self.told else []):
                return "; ".join(found)
            if not silent and (self.told is None or not left):
                return None
            if time.monotonic() > until:
                far = {rank: where for rank, where in silent.items() if not _is_here(where)}
                late = [f"rank {rank} does not answer ({where})" for rank, where in far.items()]
                return "; ".join(late or [f"rank {rank} was ended" for rank in left if self.told]) or None
            time.sleep(0.1)

    def _gone(self) -> str | None:
        """Which ranks are known to be gone now, in words; None: none."""
        found, _, left = self._known()
        return "; ".join(found) or self._named or "; ".join(f"rank {rank} left" for rank in left) or None

    def _known(self) -> tuple[list[str], dict[int, str], list[int]]:
        """Which other ranks have failed or died, in words; where those are that have said nothing; and who left after
        another one."""
        words = {rank: self._said(f"left/{rank}") for rank in range(self.world) if rank != self.rank}
        found = [f"rank {rank} failed: {text[1:]}" for rank, text in words.items() if text.startswith(FAILED)]
        silent = {rank: self._places[rank] for rank, text in words.items() if not text}
        found += [f"rank {rank} died ({where})" for rank, where in silent.items() if _is_dead(where)]
        return found, silent, [rank for rank, text in words.items() if text and not text.startswith(FAILED)]

    def _without_store(self) -> bool:
        """Whether the launcher is gone."""
        try:
            self._store.check([FIRST_CALL])
        except RuntimeError:
            return True
        return False

    def _said(self, key: str) -> str:
        """What stands in the store; empty where nothing does, or the store is gone."""
        with suppress(RuntimeError):
            if self._store.check([key]):
                return self._store.get(key).decode()
        return ""


def end_before_first_call(store: dist.Store) -> None:
    """Let the other ranks end although they have not met, or rank 0 does not lead them."""
    _of_this_attempt(store).set(FIRST_CALL, END)


def _of_this_attempt(store: dist.Store) -> dist.PrefixStore:
    """The launcher's store, without what was said before the launcher started the ranks again."""
    return dist.PrefixStore(f"dspy_fst/{'-'.join(os.environ.get(name, '') for name in ATTEMPT)}", store)


def _listed(outcomes: Iterable[tuple[int, object]]) -> str:
    return "; ".join(f"rank {rank}: {outcome or 'done'}" for rank, outcome in outcomes)


def _last_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {briefly(error)}"


def _place() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _is_here(place: str) -> bool:
    return place.endswith(f" on {socket.gethostname()}")


def _is_dead(place: str) -> bool:
    """Whether a process of this machine is gone; of another machine nothing is known."""
    if not _is_here(place):
        return False
    try:
        status: str = psutil.Process(int(place.split()[1])).status()
    except psutil.NoSuchProcess:
        return True
    return status == psutil.STATUS_ZOMBIE
