"""What a run holds in memory and writes to the disk, as it is told from one part of the plan to the next."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dspy_fst.engine.making import EngineKind
from dspy_fst.formatting.numbers import format_bytes
from dspy_fst.memory.shape import ModelSize


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


@dataclass(frozen=True)
class Allocation:
    """How much one part of a run holds in one place, in bytes."""

    place: str
    """``MEMORY``, ``GPU``, ``SECOND_GPU`` or ``DISK``."""
    part: str
    """E.g. ``"the trainer"``."""
    certain: int
    """Held over the whole run."""
    advice: tuple[str, ...] = ()
    """What reduces ``certain``, whether or not it is enough."""
    at_most: int = 0
    """Peak on top of ``certain``. Peaks of two parts never coincide."""
    expected: int = 0
    """The same peak for typical texts."""
    when: str = ""
    """The time of the peak, e.g. ``"an update"``."""
    relief: str = ""
    """What reduces the peak."""
    cuts: tuple[str, ...] = ()
    """Settings that reduce ``certain``."""
    least: int | None = None
    """``certain`` after all of ``cuts``; None means that it stays as it is."""
    made_of: tuple[tuple[str, int], ...] = ()
    """Parts of ``certain``, by name, or what is taken when; empty where there are none."""
    sure: int = 0
    """The part of the peak ``at_most`` that is surely taken."""
    given_back: int = 0
    """The part of ``certain`` that is free at the peak of another part."""

    def with_cuts(self, peak: int) -> int:
        """``certain`` and this part of the peak when every setting in ``cuts`` is changed."""
        taken = self.certain + peak
        return taken if self.least is None else min(taken, self.least)


@dataclass(frozen=True)
class Workload:
    """The model that is trained, and the engine that samples from it."""

    model: str
    size: ModelSize
    kind: EngineKind
    """``"vllm"`` or ``"in_process"``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The engine's settings."""
    longest_reply: int = 0
    """In tokens; 0 when it is unknown. A reply longer than a micro-batch is a micro-batch of its own."""
    adapters: int = 1
    """How many LoRA adapters are trained, where any is."""
    ranks: int = 1
    """Processes, each on a card of its own, that hold a part of the weights each (``sharding``)."""
