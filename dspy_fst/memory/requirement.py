"""What a run needs in one place: what its parts hold all the time, and the most that one takes at a time of its own."""

from collections.abc import Callable
from dataclasses import dataclass

from dspy_fst.formatting.numbers import format_bytes
from dspy_fst.memory.allocation import Allocation


@dataclass(frozen=True)
class Requirement:
    """All allocations in one place, and what is free there, in bytes."""

    place: str
    allocations: tuple[Allocation, ...]
    free: int

    @property
    def certain(self) -> int:
        return sum(allocation.certain for allocation in self.allocations)

    @property
    def sure(self) -> int:
        """The most that is surely taken at the time of a peak."""
        return self._most(lambda allocation: allocation.sure)

    @property
    def at_most(self) -> int:
        """The most that may be taken at the time of a peak."""
        return self._most(lambda allocation: allocation.at_most)

    @property
    def expected(self) -> int:
        """The most that is taken at the time of a peak for typical texts."""
        return self._most(lambda allocation: allocation.expected)

    @property
    def _peak(self) -> Allocation:
        return max(self.allocations, key=lambda allocation: self._during(allocation, allocation.at_most))

    def _most(self, peak: Callable[[Allocation], int]) -> int:
        return max(self._during(allocation, peak(allocation)) for allocation in self.allocations)

    def _during(self, busy: Allocation, peak: int) -> int:
        """What all parts take while one is at its peak."""
        return self.certain + peak - self._given_back_to(busy)

    def _given_back_to(self, busy: Allocation) -> int:
        return sum(other.given_back for other in self.allocations if other is not busy)

    def fault(self, model: str) -> str | None:
        """A sentence when what is surely taken does not fit."""
        if self.sure <= self.free:
            return None
        busy = max(self.allocations, key=lambda allocation: self._during(allocation, allocation.sure))
        taken = [
            (one.part, one.certain + one.sure if one is busy else one.certain - one.given_back)
            for one in self.allocations
        ]
        shares = " and ".join(f"{format_bytes(size)} for {part}" for part, size in taken if size)
        advice = ", ".join(
            dict.fromkeys(advice for allocation in self.allocations for advice in self._advice(allocation))
        )
        return f"{self.place}: training {model} takes {shares}, and {format_bytes(self.free)} are free; {advice}"

    @property
    def with_cuts(self) -> int:
        """``sure`` when every setting that reduces it is changed."""
        held = sum(allocation.with_cuts(0) for allocation in self.allocations)
        return max(
            held + busy.with_cuts(busy.sure) - busy.with_cuts(0) - self._given_back_to(busy)
            for busy in self.allocations
        )

    def _advice(self, allocation: Allocation) -> tuple[str, ...]:
        """Settings are named only when all of them together make the run fit."""
        return (*allocation.advice, *(allocation.cuts if self.with_cuts <= self.free else ()))

    def warning(self, model: str) -> str | None:
        """A sentence when the peak may not fit."""
        if not self.sure <= self.free < self.at_most:
            return None
        return (
            f"{self.place}: with {model} {self._peak.when} may take up to {format_bytes(self.at_most)} in all, and "
            f"{format_bytes(self.free)} are free; if that proves too little, {self._peak.relief}"
        )
