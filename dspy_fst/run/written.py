"""How many bytes a run writes, and bytes as text."""

from dataclasses import dataclass

MIB, GIB = 2**20, 2**30
MUCH_WRITTEN = 2**40
"""Bytes over a run above which a warning is given (ours): a disk that writes 1 GiB/s takes 17 minutes."""


@dataclass(frozen=True)
class Writes:
    """The most that a run writes to the disk, including files that it removes again."""

    weights: int
    """Bytes of one published version. Each update that moves the weights publishes one."""
    updates: int
    state: int
    """Bytes of one resumable state after an update."""
    states: int

    @property
    def total(self) -> int:
        return self.weights * (1 + self.updates) + self.state * self.states

    @property
    def words(self) -> str:
        return (
            f"written over the run: at most {format_bytes(self.total)}, {format_bytes(self.weights)} of weights for "
            f"each of {self.updates} updates and {format_bytes(self.state)} for each of {self.states} states"
        )


def format_bytes(amount: int) -> str:
    """Bytes as text.

    >>> format_bytes(3 * 2**29), format_bytes(2**20)
    ('1.5 GiB', '1 MiB')
    """
    return f"{amount / GIB:.1f} GiB" if amount >= GIB else f"{amount / MIB:.0f} MiB"
