"""How much a run writes, and bytes as people read them."""

from dataclasses import dataclass

MIB, GIB = 2**20, 2**30
MUCH_WRITTEN = 2**40
"""Bytes over a run from which on its writing is warned of (ours): a disk that writes 1 GiB/s takes 17 minutes."""


@dataclass(frozen=True)
class Writes:
    """What a run writes to the disk at most, files that it removes again included."""

    weights: int
    """Bytes of one published version; there is one for each update that moves the weights."""
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
            f"written over the run: at most {shown(self.total)}, {shown(self.weights)} of weights for each of "
            f"{self.updates} updates and {shown(self.state)} for each of {self.states} states"
        )


def shown(amount: int) -> str:
    """Bytes as people read them.

    >>> shown(3 * 2**29), shown(2**20)
    ('1.5 GiB', '1 MiB')
    """
    return f"{amount / GIB:.1f} GiB" if amount >= GIB else f"{amount / MIB:.0f} MiB"
