"""What a trainer asks of the other ranks; a process alone has none, and asks nothing."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dspy_fst.engine.machine import has_gpu
from dspy_fst.errors import TrainingError, briefly
from dspy_fst.model_files.weights_digest import weights_digest

OTHERS = (
    "{path}: rank {rank} reads other weights there than rank 0 ({own}, not {first}); give every machine the same folder"
)
SHARED_FOLDER = (
    "with sharding='fsdp' each rank writes its part of a state; put run_dir where the machines of all ranks see it and "
    "may write"
)
T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")
SAME = 1e-9
"""Largest relative gap of the norms of the same weights; float64 sums in another order differ by some 1e-15."""


class Ranks:
    """One process alone. `SeveralRanks` are several."""

    rank, world = 0, 1

    @property
    def device(self) -> torch.device:
        """The GPU of this rank, or the CPU where there is none."""
        return torch.device("cuda" if has_gpu() else "cpu")

    @contextmanager
    def together(self, call: str, arguments: Sequence[object], options: Mapping[str, object]) -> Iterator[None]:
        """A block that every rank enters: rank 0 tells the others which of the trainer's methods they are to call."""
        yield

    @contextmanager
    def naming_lost(self) -> Iterator[None]:
        """A block in which an error that another rank caused names that rank."""
        yield

    def share(self, items: Iterable[T]) -> Iterable[T]:
        """This rank's share. All ranks give the same items in the same order."""
        return items

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Put the sum of all ranks' gradients in place of each rank's own. One that no rank has stays None."""

    def gathered(self, what: T) -> list[T]:
        """What each rank gives, by rank."""
        return [what]

    def in_parts(self, tensors: Mapping[str, Tensor]) -> Callable[[Path], None]:
        """Begin to write a state of which each rank has a share; see `slow.ranks.writing.PartsWriter`."""
        raise NotImplementedError("a process alone writes a state as one file")

    def check_same(self, weights: Iterable[Tensor], path: object) -> None:
        """
        Args:
            weights: That every rank has read from ``path``, whole.

        Raises:
            TrainingError: the ranks hold different weights, e.g. of folders of one name on several machines.
        """
        if self.world == 1:
            return
        norms = self.gathered(_norm(weights))
        for rank, norm in enumerate(norms):
            if not math.isclose(norm, norms[0], rel_tol=SAME):
                raise TrainingError(OTHERS.format(path=path, rank=rank, own=f"norm {norm!r}", first=repr(norms[0])))

    def check_same_folder(self, folder: Path) -> None:
        """`check_same` for weights that are read later, and not by every rank at the same time.

        Raises:
            TrainingError: the ranks see different weights there, or one sees none.
        """
        if self.world > 1:
            self.check_alike(_digest(folder), folder)

    def check_alike(self, own: str, path: Path) -> None:
        """`check_same` for what this rank says of weights, in words.

        Raises:
            TrainingError: the ranks say different things.
        """
        told = self.gathered(own)
        for rank, words in enumerate(told):
            if words != told[0]:
                raise TrainingError(OTHERS.format(path=path, rank=rank, own=words, first=told[0]))

    def check_writes(self, probe: Path, content: str) -> None:
        """
        Args:
            probe: A file that rank 0 has just written, with this content.

        Raises:
            TrainingError: a rank does not see it, or cannot write beside it.
        """
        faults = self.gathered(_unwritable(probe, content, self.rank))
        if told := [f"rank {rank} {fault}" for rank, fault in enumerate(faults) if fault]:
            raise TrainingError(f"{'; '.join(told)}: {SHARED_FOLDER}")


def _unwritable(probe: Path, content: str, rank: int) -> str | None:
    """Why this process cannot write beside the probe, for who wrote that, as the end of a sentence; None: it can."""
    own = probe.with_name(f"{probe.name}-{rank}")
    try:
        if probe.read_text(encoding="utf-8") != content:
            return f"sees another {probe.parent} than rank 0"
        own.touch()
        own.unlink()
    except FileNotFoundError:
        return f"does not see {probe.parent} as rank 0 does"
    except OSError as error:
        return f"cannot write in {probe.parent} ({briefly(error)})"
    return None


def _digest(folder: Path) -> str:
    """In words; as far as they tell it apart from another."""
    try:
        return f"checksum {weights_digest(folder)[:12]}"
    except ValueError as error:
        return briefly(error)


@torch.no_grad()
def _norm(weights: Iterable[Tensor]) -> float:
    """Of all their numbers."""
    numbers = [own for own in weights if own.is_floating_point()]
    return math.hypot(*(float(torch.linalg.vector_norm(own, dtype=torch.float64)) for own in numbers))


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """The tensor on every rank, put together from its parts; one without parts as it is. A call of all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


ALONE = Ranks()


class Ranked(Protocol):
    """What has its calls made by all ranks."""

    ranks: Ranks


class Shared(Ranked, Protocol):
    """The same, of which each rank may hold a part alone."""

    sharded: bool


S = TypeVar("S", bound=Ranked)
H = TypeVar("H", bound=Shared)


def on_all_ranks(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that every rank calls when rank 0 does, with the same arguments."""

    @wraps(method)
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.ranks.together(method.__name__, args, kwargs):
            return method(self, *args, **kwargs)

    return call


def on_all_holders(method: Callable[Concatenate[H, P], R]) -> Callable[Concatenate[H, P], R]:
    """The same where every rank holds a part of the weights; where each holds all, a call of rank 0 alone."""

    of_all = on_all_ranks(method)

    @wraps(method)
    def call(self: H, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return of_all(self, *args, **kwargs) if self.sharded else method(self, *args, **kwargs)

    return call
