"""The rollouts of one cycle's search, each made once: weights do not change, so a rollout need not be repeated."""

from collections import Counter
from collections.abc import Callable, Sequence

import dspy

from dspy_fst.errors import MeasurementError
from dspy_fst.fast.journal_protocol import SearchJournal, operation_key
from dspy_fst.outcomes.outcome import OutcomeCounts
from dspy_fst.rollout.jsonable import rollouts_from_json, rollouts_to_json
from dspy_fst.rollout.rollouter import Task
from dspy_fst.types import Candidate, Problem, Rollout

Play = Callable[[Sequence[Task]], list[Rollout]]
"""Makes one rollout for each task, all under the current weights."""
Key = tuple[str, int, int]
"""Digest of the candidate, index of the problem, number among equal ones."""
OUTAGE = 12
"""A search stops when so many rollouts in a row, counted in whole batches, measured nothing (ours)."""
TRIES = 2
"""How often a masked rollout is made in all before it stays unmeasured for the search (ours)."""


class RolloutBank:
    """Rollouts of one cycle by (candidate, problem, number). None is made twice under the same weights.

    Args:
        play: Makes rollouts.
        program: The program whose predictors the traces of recalled rollouts refer to.
        journal: Records what was made.
        calls: Whether the record holds the calls of the rollouts as well, for whoever trains on them.
    """

    def __init__(self, play: Play, program: dspy.Module, journal: SearchJournal, *, calls: bool = False):
        self._play, self._program, self._journal, self._calls = play, program, journal, calls
        self._masked_in_a_row = 0
        self._banked: dict[Key, Rollout] = {}
        self._tries: Counter[Key] = Counter()
        self.fresh: list[Rollout] = []
        """Rollouts made for this bank, in order."""
        self.scoring: list[Rollout] = []
        """Of these the ones that score a candidate: number 0 of each candidate and problem."""
        self.repeats = 0
        """Requests that were answered without a new rollout."""
        self.sampled_tokens = 0

    def get(self, wanted: Sequence[Task]) -> list[Rollout]:
        """One rollout for each task, in order.

        Raises:
            MeasurementError: nothing is measured any more.
        """
        missing = {key_of(task): task for task in wanted if key_of(task) not in self._banked}
        new = dict(zip(missing, self._play_or_recall(list(missing.values())), strict=True)) if missing else {}
        self.fresh += new.values()
        self.scoring += (rollout for (*_, number), rollout in new.items() if number == 0)
        self.repeats += len(wanted) - len(missing)
        known = self._banked | new
        self._tries.update(new.keys())
        # A masked rollout measured nothing. It is made again when asked for again, up to TRIES times.
        self._banked |= {key: r for key, r in new.items() if r.mask is None or self._tries[key] >= TRIES}
        return [known[key_of(task)] for task in wanted]

    def lacks(self, wanted: Sequence[Task]) -> list[Task]:
        """The tasks that would cost a rollout, each once."""
        return list({key_of(task): task for task in wanted if key_of(task) not in self._banked}.values())

    def _play_or_recall(self, wanted: Sequence[Task]) -> list[Rollout]:
        """Make the rollouts, or recall those that an interrupted search made.

        Rollouts that JSON cannot hold are made again, in the same batch and with the same seeds.
        """
        key = operation_key([(task.problem.index, task.candidate.digest) for task in wanted])
        recalled = self._journal.recall("rollouts", key)
        if recalled is not None and recalled["rollouts"] is not None:
            self.sampled_tokens += recalled["tokens"]
            candidates = [task.candidate for task in wanted]
            return rollouts_from_json(recalled["rollouts"], candidates, self._program)
        rollouts = self._made(wanted)
        if recalled is None:
            self._record(key, rollouts)
        return rollouts

    def _made(self, wanted: Sequence[Task]) -> list[Rollout]:
        rollouts = self._play(wanted)
        self._refuse_outage(rollouts)
        self.sampled_tokens += sum(rollout.tokens for rollout in rollouts)
        return rollouts

    def _record(self, key: str, rollouts: Sequence[Rollout]) -> None:
        kept = rollouts_to_json(rollouts, calls=self._calls)
        tokens = sum(rollout.tokens for rollout in rollouts)
        self._journal.record("rollouts", key, {"rollouts": kept, "tokens": tokens})

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


class UnorderedBank(RolloutBank):
    """A bank for searches whose rollouts come in an order that differs from process to process.

    Each rollout is recorded by itself, and recalled wherever the repeated search asks for it. Its seed does not depend
    on the order either.
    """

    def __init__(self, play: Play, program: dspy.Module, journal: SearchJournal, *, calls: bool = False):
        super().__init__(play, program, journal, calls=calls)
        self._recorded = journal.take_all("rollouts")

    def _play_or_recall(self, wanted: Sequence[Task]) -> list[Rollout]:
        found = {key_of(task): self._recalled(task) for task in wanted}
        due = [task for task in wanted if found[key_of(task)] is None]
        for task, rollout in zip(due, self._made(due) if due else (), strict=True):
            found[key_of(task)] = rollout
            self._record(_recorded_as(task, self._tries[key_of(task)]), [rollout])
        return [rollout for rollout in found.values() if rollout is not None]

    def _recalled(self, task: Task) -> Rollout | None:
        """The rollout as a killed process recorded it; None if it must be made, also where JSON could not hold it."""
        recorded = self._recorded.pop(_recorded_as(task, self._tries[key_of(task)]), None)
        if recorded is None or recorded["rollouts"] is None:
            return None
        self.sampled_tokens += recorded["tokens"]
        return rollouts_from_json(recorded["rollouts"], [task.candidate], self._program)[0]

    def known(self, candidate: Candidate, problems: Sequence[Problem]) -> list[float | None]:
        """The candidate's reward on each problem, as far as it is measured."""
        found = (self._banked.get(key_of(Task(problem, candidate))) for problem in problems)
        return [None if rollout is None else rollout.reward for rollout in found]

    def left_over(self) -> tuple[int, int]:
        """Rollouts and their tokens that a killed process made and that this one did not ask for."""
        return len(self._recorded), sum(recorded["tokens"] for recorded in self._recorded.values())


def key_of(task: Task) -> Key:
    """What identifies the rollout of a task."""
    return task.candidate.digest, task.problem.index, task.sample


def _recorded_as(task: Task, tries: int) -> str:
    return operation_key([*key_of(task), tries])
