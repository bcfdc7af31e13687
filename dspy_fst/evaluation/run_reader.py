"""What a run left behind: its populations and its weights, by cycle."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from dspy_fst.engine.base import Checkpoint
from dspy_fst.errors import ConfigurationError, RunDirectoryError
from dspy_fst.report.from_directory import read_records
from dspy_fst.report.run_record import RunRecord
from dspy_fst.rollout.adapters import SavedAdapter, recorded
from dspy_fst.run.directory import VERSION
from dspy_fst.run.files import population_from_json, read_json
from dspy_fst.run.manifest import read_document
from dspy_fst.types import Candidate, Population, WeightsVersion, version_of


@dataclass(frozen=True)
class Past:
    """A run that is finished, goes on or was killed, read from its directory alone."""

    run_dir: Path
    record: RunRecord

    @classmethod
    def of(cls, run_dir: Path) -> "Past":
        """
        Raises:
            RunDirectoryError: it is not the directory of a run.
        """
        (record,) = read_records([run_dir])
        return cls(run_dir, record)

    @cached_property
    def populations(self) -> Mapping[int, Population]:
        """Cycle -> the population that its search chose; empty for a run without searches."""
        paths = sorted((self.run_dir / "populations").glob("cycle-*.json"))
        return {int(path.stem.removeprefix("cycle-")): population_from_json(read_document(path)) for path in paths}

    @property
    def kept(self) -> list[WeightsVersion]:
        """Weights that are still on the disk, the oldest first."""
        folder = self.run_dir / "weights"
        return sorted(path.name for path in folder.iterdir() if VERSION.fullmatch(path.name)) if folder.is_dir() else []

    @property
    def last_cycle(self) -> int | None:
        """The newest cycle that searched or trained; None before the first."""
        return max([*self.populations, *(step.cycle for step in self.record.steps)], default=None)

    @property
    def returned_cycle(self) -> int | None:
        """The cycle whose end the run returned, or the newest; None where it returned a state from before its end."""
        returned = self.record.returned
        return self.last_cycle if returned is None or returned.when == "end" else None

    @property
    def adapter(self) -> SavedAdapter | None:
        """What the run speaks through; None for a run of a release that recorded none.

        Raises:
            RunDirectoryError: its recipe holds something else in that place.
        """
        path = self.run_dir / "recipe.json"
        try:
            return recorded((read_json(path) or {}).get("adapter"))
        except (ValueError, TypeError, AttributeError) as error:
            raise RunDirectoryError(f"{path}: adapter: {error}") from error

    def require_cycle(self, cycle: int) -> None:
        """
        Raises:
            ConfigurationError: the run has not come to this cycle.
        """
        if self.last_cycle is None or cycle > self.last_cycle:
            last = "none" if self.last_cycle is None else f"0 to {self.last_cycle}"
            raise ConfigurationError([f"cycle {cycle}: {self.run_dir} has not come to it; its cycles so far: {last}"])

    def population(self, cycle: int | None = None) -> Population | None:
        """The population that a cycle trained with; without a cycle the one that the run returned, ranked as there,
        or the newest while it is not finished.

        None for a run that has not searched by then.
        """
        returned = self.record.returned
        latest = returned.searched if cycle is None and returned is not None else cycle
        known = [number for number in self.populations if latest is None or number <= latest]
        if not known:
            return None
        population = self.populations[max(known)]
        return population if cycle is not None else self._ranked(population)

    def _ranked(self, population: Population) -> Population:
        """Best validation score first, where the run has validated."""
        nodes = self.record.by_digest
        scores = {digest: node.validation for digest, node in nodes.items() if node.validation is not None}
        if not scores:
            return population
        members = sorted(population.members, key=lambda member: scores.get(member.digest, float("-inf")), reverse=True)
        return replace(population, members=tuple(members), scores=tuple(scores.get(m.digest) for m in members))

    def version(self, cycle: int | None = None) -> WeightsVersion:
        """Name of the weights at the end of a cycle; without one those that the run returned, or the newest kept."""
        if cycle is None:
            return self.record.weights or (self.kept or [version_of(0)])[-1]
        return self.version_after(1 + max((r.step for r in self.record.steps if r.cycle <= cycle), default=-1))

    def version_after(self, steps: int) -> WeightsVersion:
        """Name of the weights after so many steps; one that moved nothing left the name as it was."""
        made = [report for report in self.record.steps if report.step < steps]
        return max(made, key=lambda report: report.step).left if made else version_of(0)

    def checkpoint(self, version: WeightsVersion) -> Checkpoint:
        """These weights.

        Raises:
            RunDirectoryError: they are not kept.
        """
        if version not in self.kept:
            raise RunDirectoryError(
                f"{self.run_dir}: the weights {version} are not there; kept are {', '.join(self.kept) or 'none'}. A "
                "run keeps the first, the best and the newest weights; keep_weights in a project's recipe says how "
                "many of the newest"
            )
        return Checkpoint(version, self.run_dir / "weights" / version)

    def candidate(self, digest: str) -> Candidate:
        """The candidate whose digest begins so, of all that the run's searches tried.

        Raises:
            ConfigurationError: there is none, or several.
        """
        tried = [(node.digest, Candidate(node.texts)) for node in self.record.nodes]
        # A text that secrets were taken out of is not the one that was tried.
        known = {name: candidate for name, candidate in tried if candidate.digest == name}
        known |= {member.digest: member for population in self.populations.values() for member in population.members}
        found = [known[name] for name in known if name.startswith(digest)]
        if len(found) != 1:
            names = ", ".join(candidate.digest for candidate in found) if found else ", ".join(known) or "none yet"
            how = "several candidates begin so" if found else "no candidate has this digest"
            raise ConfigurationError([f"candidate {digest!r}: {how}; choose one of {names}"])
        return found[0]
