"""What rank 0 does around a run, and what the other ranks do instead of one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from dspy_fst.engine.machine import Launch
from dspy_fst.errors import ConfigurationError, RankError, TrainingError
from dspy_fst.run.interrupts import signals_raise
from dspy_fst.slow.ranks.ranks import Ranks
from dspy_fst.slow.ranks.several import END, SeveralRanks
from dspy_fst.slow.trainer import Trainer

BUILD = "build"
ENDED = (
    "the other of the {world} processes ended with the first compile(), as every process but rank 0 does; make one run "
    "in a launch, or launch the second alone"
)
_over = False
"""Whether the other ranks have ended."""


def make_trainer(ranks: Ranks, model: Path, *settings: object, **options: object) -> Trainer:
    """A trainer on each rank, with these arguments of `Trainer`.

    Raises:
        TrainingError: as `Trainer` has it.
    """
    with ranks.together(BUILD, (model, *settings), options):
        return Trainer(model, *settings, ranks=ranks, **options)  # type: ignore[arg-type]  # its own arguments


@contextmanager
def leading(launch: Launch) -> Iterator[Ranks]:
    """Rank 0's block of a run; the other ranks obey in it, and end with it.

    Raises:
        ConfigurationError: they have ended with a block before.
    """
    global _over
    if _over:
        raise ConfigurationError([ENDED.format(world=launch.world)])
    group, _over = SeveralRanks(launch), True
    try:
        yield group
    finally:
        group.end()


def obey(launch: Launch) -> NoReturn:
    """Be another rank than 0 for the whole of a run: make the calls that rank 0 makes of its trainer, and end then.

    Raises:
        SystemExit: with status 0 when rank 0 is done.
        Exception: what failed here alone, or rank 0's connection; rank 0 is told.
    """
    with signals_raise():
        group = SeveralRanks(launch)
        try:
            _make_calls(group)
        except BaseException as error:
            group.leave(error)
            raise
        group.end()
    raise SystemExit(0)


def _make_calls(group: SeveralRanks) -> None:
    trainer: Trainer | None = None
    while True:
        call, (arguments, options) = group.hear()
        if call == END:
            return
        try:
            if call == BUILD:
                trainer = make_trainer(group, *arguments, **options)  # type: ignore[arg-type]
            else:
                getattr(trainer, call)(*arguments, **options)
        except RankError:
            raise
        except TrainingError:
            pass  # rank 0 has the same, and decides
