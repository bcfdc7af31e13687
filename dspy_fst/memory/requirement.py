"""What a run needs in one place: what its parts hold all the time, and the most that one takes at a time of its own."""

from dataclasses import dataclass

from dspy_fst.formatting.numbers import format_bytes
from dspy_fst.memory.bytes_by_part import Allocation


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
        """``certain`` and the largest part of a peak that is surely taken."""
        return self.certain + max(allocation.sure for allocation in self.allocations)

    @property
    def at_most(self) -> int:
        """``certain`` and the largest peak."""
        return self.certain + self._peak.at_most

    @property
    def expected(self) -> int:
        """``certain`` and the largest peak for typical texts."""
        return self.certain + max(allocation.expected for allocation in self.allocations)

    @property
    def _peak(self) -> Allocation:
        return max(self.allocations, key=lambda allocation: allocation.at_most)

    def fault(self, model: str) -> str | None:
        """A sentence when what is surely taken does not fit."""
        if self.sure <= self.free:
            return None
        shares = " and ".join(
            f"{format_bytes(allocation.certain + allocation.sure)} for {allocation.part}"
            for allocation in self.allocations
            if allocation.certain
        )
        advice = ", ".join(
            dict.fromkeys(advice for allocation in self.allocations for advice in self._advice(allocation))
        )
        return f"{self.place}: training {model} takes {shares}, and {format_bytes(self.free)} are free; {advice}"

    @property
    def with_cuts(self) -> int:
        """``sure`` when every setting that reduces it is changed."""
        return sum(allocation.with_cuts for allocation in self.allocations)

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
