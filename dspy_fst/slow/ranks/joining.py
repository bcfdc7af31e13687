"""Where a process that was launched with others finds out what it is; torch is imported only if there are others."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dspy_fst.engine.machine import Launch, launch_faults

if TYPE_CHECKING:
    from dspy_fst.slow.ranks.ranks import Ranks


def obey_unless_first() -> None:
    """Returns on rank 0, and to a process alone. Another rank obeys rank 0 until it is done.

    Raises:
        SystemExit: this is another rank, and rank 0 is done.
    """
    launch = Launch.of()
    if launch.rank and not launch_faults():
        from dspy_fst.slow.ranks.roles import obey

        obey(launch)


@contextmanager
def all_ranks() -> Iterator["Ranks | None"]:
    """The block of a run, in which all ranks train; None in a process alone, or in one that `check` will refuse.

    Raises:
        SystemExit: as `obey_unless_first` has it.
        ConfigurationError: the other ranks ended with a run before.
    """
    obey_unless_first()
    launch = Launch.of()
    if launch.world == 1 or launch_faults():
        yield None
        return
    from dspy_fst.slow.ranks.roles import leading

    with leading(launch) as ranks:
        yield ranks
