"""The rollouts of one cycle's search, each made once: weights do not change, so a rollout need not be repeated."""

from collections import Counter
from collections.abc import Callable, Sequence

import dspy

from dspy_fst.errors import MeasurementError
from dspy_fst.fast.journal_protocol import SearchJournal, operation_key
from dspy_fst.outcomes.outcome import OutcomeCounts
from dspy_fst.rollout.jsonable import rollouts_from_json, rollouts_to_json
from dspy_fst.types import Candidate, Problem, Rollout

Wanted = Sequence[tuple[Problem, Candidate]]
Play = Callable[[Wanted], list[Rollout]]
"""Makes one rollout for each (problem, candidate), all under the current weights."""
OUTAGE = 12
"""A search stops when so many rollouts in a row, counted in whole batches, measured nothing (ours)."""
TRIES = 2
"""How often a masked rollout is made in all before it stays unmeasured for the search (ours)."""


class RolloutBank:
    """Rollouts of one cycle by (candidate, problem). None is made twice under the same weights.

    Args:
        play: Makes rollouts.
        program: The program whose predictors the traces of recalled rollouts refer to.
        journal: Records what was made.
        calls: Whether the record holds the calls of the rollouts as well, for whoever trains on them.
    """

    def __init__(self, play: Play, program: dspy.Module, journal: SearchJournal, *, calls: bool = False):
        self._play, self._program, self._journal, self._calls = play, program, journal, calls
        self._masked_in_a_row = 0
        self._banked: dict[tuple[str, int], Rollout] = {}
        self._tries: Counter[tuple[str, int]] = Counter()
        self.fresh: list[Rollout] = []
        """Rollouts made for this bank, in order."""
        self.reused = 0
        """Requests that were answered without a new rollout."""
        self.sampled_tokens = 0

    def get(self, wanted: Wanted) -> list[Rollout]:
        """One rollout for each (problem, candidate), in order.

        Raises:
            MeasurementError: nothing is measured any more.
        """
        missing = {(c.digest, p.index): (p, c) for p, c in wanted if (c.digest, p.index) not in self._banked}
        new = dict(zip(missing, self._play_or_recall(list(missing.values())), strict=True)) if missing else {}
        self.fresh += new.values()
        self.reused += len(wanted) - len(missing)
        known = self._banked | new
        self._tries.update(new.keys())
        # A masked rollout measured nothing. It is made again when asked for again, up to TRIES times.
        self._banked |= {key: r for key, r in new.items() if r.mask is None or self._tries[key] >= TRIES}
        return [known[candidate.digest, problem.index] for problem, candidate in wanted]

    def _play_or_recall(self, wanted: Wanted) -> list[Rollout]:
        """Make the rollouts, or recall those that an interrupted search made.

        Rollouts that JSON cannot hold are made again, in the same batch and with the same seeds.
        """
        key = operation_key([(problem.index, candidate.digest) for problem, candidate in wanted])
        recalled = self._journal.recall("rollouts", key)
        if recalled is not None and recalled["rollouts"] is not None:
            self.sampled_tokens += recalled["tokens"]
            candidates = [candidate for _, candidate in wanted]
            return rollouts_from_json(recalled["rollouts"], candidates, self._program)
        rollouts = self._play(wanted)
        self._refuse_outage(rollouts)
        tokens = sum(rollout.tokens for rollout in rollouts)
        self.sampled_tokens += tokens
        if recalled is None:
            kept = rollouts_to_json(rollouts, calls=self._calls)
            self._journal.record("rollouts", key, {"rollouts": kept, "tokens": tokens})
        return rollouts

    def _refuse_outage(self, rollouts: Sequence[Rollout]) -> None:
        """Stop when nothing is measured any more: to GEPA every new candidate would look worthless.

        Raises:
            MeasurementError: the newest batch is not recorded, so that a repeated search tries it again.
        """
        masked = OutcomeCounts.over(rollout.outcome for rollout in rollouts).masked
        self._masked_in_a_row = self._masked_in_a_row + len(rollouts) if masked.total() == len(rollouts) else 0
        if self._masked_in_a_row >= OUTAGE:
            raise MeasurementError(
                f"the last {self._masked_in_a_row} rollouts of the search measured nothing "
                f"({', '.join(sorted(masked))}); mend the cause and compile again with the same run_dir to go on"
            )
