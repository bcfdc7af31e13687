"""What a trainer asks of the other ranks; a process alone has none, and asks nothing."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import nn

from dspy_fst.engine.machine import has_gpu

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")


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


ALONE = Ranks()


class Ranked(Protocol):
    """What has its calls made by all ranks."""

    ranks: Ranks


S = TypeVar("S", bound=Ranked)


def on_all_ranks(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that every rank calls when rank 0 does, with the same arguments."""

    @wraps(method)
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.ranks.together(method.__name__, args, kwargs):
            return method(self, *args, **kwargs)

    return call
