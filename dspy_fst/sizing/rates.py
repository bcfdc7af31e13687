"""How fast a machine does what a cycle asks of it: the simulation's only knowledge of a machine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineRates:
    """One engine. A decoding step of n rows takes ``step_s + n * row_s`` seconds, so throughput saturates at 1/row_s.

    >>> EngineRates(step_s=0.01, row_s=0.001).tokens_per_s(10)
    500.0
    """

    step_s: float
    """Seconds of a decoding step whatever its rows: the weights are read once."""
    row_s: float
    """Further seconds for each row: its keys and values, and its operations."""
    prompt_s: float = 0.0
    """Seconds for each token of a prompt. Rows stand still meanwhile."""
    rows: int = 1_000_000
    """Most rows at once, by the room for keys and values."""
    joins: bool = True
    """Whether calls join those that are sampled; else a batch begins when every caller waits, and ends with its last
    row (the engine in process, on a CPU)."""

    def tokens_per_s(self, rows: float) -> float:
        """Tokens a second with so many rows."""
        return rows / (self.step_s + rows * self.row_s)

    @property
    def half_full(self) -> float:
        """Rows at which the engine samples half as many tokens a second as it ever could."""
        return self.step_s / self.row_s if self.row_s else float(self.rows)


@dataclass(frozen=True)
class MachineRates:
    """All engines, the trainer, and what lies between them. Seconds, unless said otherwise."""

    engine: EngineRates
    engines: int = 1
    program_s: float = 0.0
    """Python of each call. One process plays the programs, and does so for one call at a time."""
    play_s: float = 0.0
    """Of each set of rollouts that are made together, beside the rollouts."""
    reflection_s: float = 0.0
    """Of one reflection. Those that are asked for together take as long as one."""
    update_s: float = 0.0
    """Of an update, whatever it reads."""
    update_token_s: float = 0.0
    """Further seconds for each token that an update reads."""
    publish_s: float = 0.0
    """Writing the weights, and loading them on every engine."""
    verify_s: float = 0.0
    """Comparing on the engines what was published."""
    state_s: float = 0.0
    """Writing a state, while the next step is sampled. The next update waits for its end."""
    rest_s: float = 0.0
    """Of each step, beside the activities above: credit, events, bookkeeping."""
