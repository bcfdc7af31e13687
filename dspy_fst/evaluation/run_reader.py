"""`RunReader`: the populations and weights that a run left on the disk, by cycle."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dspy_fst.engine.base import Checkpoint
from dspy_fst.errors import ConfigurationError, RunDirectoryError
from dspy_fst.report.from_directory import read_records
from dspy_fst.report.run_record import RunRecord
from dspy_fst.rollout.chat_adapters import SavedAdapter, recorded
from dspy_fst.run.directory import VERSION
from dspy_fst.run.files import population_from_json, read_json
from dspy_fst.run.validated import ranked_by
from dspy_fst.saving.manifest import read_document
from dspy_fst.types import WARM_START, Candidate, Population, WeightsVersion, version_of


@dataclass(frozen=True)
class RunReader:
    """Reads a run that has ended, is running or was killed, from its directory alone."""

    run_dir: Path
    record: RunRecord

    @classmethod
    def of(cls, run_dir: Path) -> "RunReader":
        """
        Raises:
            RunDirectoryError: the path is not the directory of a run.
        """
        (record,) = read_records([run_dir])
        return cls(run_dir, record)

    @cached_property
    def populations(self) -> Mapping[int, Population]:
        """Cycle -> the population that its search selected; empty for a run without searches."""
        paths = sorted((self.run_dir / "populations").glob("cycle-*.json"))
        return {int(path.stem.removeprefix("cycle-")): population_from_json(read_document(path)) for path in paths}

    @property
    def kept(self) -> list[WeightsVersion]:
        """Names of the weights that are still on the disk, oldest first."""
        folder = self.run_dir / "weights"
        return sorted(path.name for path in folder.iterdir() if VERSION.fullmatch(path.name)) if folder.is_dir() else []

    @property
    def last_cycle(self) -> int | None:
        """The last cycle that searched or trained; None before the first."""
        return max([*self.populations, *(step.cycle for step in self.record.steps)], default=None)

    @property
    def returned_cycle(self) -> int | None:
        """The last cycle, if the run returned its end; None if it returned an earlier state."""
        returned = self.record.returned
        return self.last_cycle if returned is None or returned.when == "end" else None

    @property
    def adapter(self) -> SavedAdapter | None:
        """The adapter of the run; None for a run of a release that did not record it.

        Raises:
            RunDirectoryError: the recipe's entry for it is not an adapter.
        """
        path = self.run_dir / "recipe.json"
        try:
            return recorded((read_json(path) or {}).get("adapter"))
        except (ValueError, TypeError, AttributeError) as error:
            raise RunDirectoryError(f"{path}: adapter: {error}") from error

    def require_cycle(self, cycle: int) -> None:
        """
        Raises:
            ConfigurationError: the run has not reached this cycle.
        """
        if self.last_cycle is None or cycle > self.last_cycle:
            last = "none" if self.last_cycle is None else f"0 to {self.last_cycle}"
            raise ConfigurationError([f"cycle {cycle}: {self.run_dir} has not reached it; its cycles so far: {last}"])

    def population(self, cycle: int | None = None) -> Population | None:
        """The population that a cycle trained with. Without a cycle: the one that the run returned, in that order, or
        the last one while the run has not ended.

        None for a run that had not searched by then.
        """
        returned = self.record.returned
        latest = returned.searched if cycle is None and returned is not None else cycle
        known = [number for number in self.populations if latest is None or number <= latest]
        if not known:
            return None
        population = self.populations[max(known)]
        return population if cycle is not None else self._ranked(population)

    def _ranked(self, population: Population) -> Population:
        """The population with the best validation score first, if the run has validated."""
        nodes = self.record.by_digest
        scores = {digest: node.validation for digest, node in nodes.items() if node.validation is not None}
        if not scores:
            return population
        return ranked_by(population, scores)

    def version(self, cycle: int | None = None) -> WeightsVersion:
        """Name of the weights at a cycle's end. Without a cycle: those that the run returned, or the newest kept."""
        if cycle is None:
            return self.record.weights or (self.kept or [version_of(0)])[-1]
        return self.version_after(1 + max((r.step for r in self.record.steps if r.cycle <= cycle), default=-1))

    def version_after(self, steps: int) -> WeightsVersion:
        """Name of the weights after so many steps. A step that changed no weights keeps the name."""
        done = [report for report in self.record.steps if report.step < steps]
        if done:
            return max(done, key=lambda report: report.step).left
        return WARM_START if WARM_START in self.kept else version_of(0)

    def checkpoint(self, version: WeightsVersion) -> Checkpoint:
        """The weights of this name.

        Raises:
            RunDirectoryError: the run has not kept them.
        """
        if version not in self.kept:
            raise RunDirectoryError(
                f"{self.run_dir}: the weights {version} are not kept; those that are: "
                f"{', '.join(self.kept) or 'none'}. A run keeps the first, the best and the newest weights; "
                "keep_weights in a project's recipe says how many of the newest"
            )
        return Checkpoint.at(version, self.run_dir / "weights" / version)

    def candidate(self, digest: str) -> Candidate:
        """The candidate whose digest begins with ``digest``, of all that the run's searches tried.

        Raises:
            ConfigurationError: there is none, or there are several.
        """
        tried = [(node.digest, Candidate(node.texts)) for node in self.record.nodes]
        # A text from which secrets were removed is not the text that was tried.
        known = {name: candidate for name, candidate in tried if candidate.digest == name}
        known |= {member.digest: member for population in self.populations.values() for member in population.members}
        matches = [known[name] for name in known if name.startswith(digest)]
        if len(matches) != 1:
            names = ", ".join(candidate.digest for candidate in matches) if matches else ", ".join(known) or "none yet"
            how = "several candidates begin so" if matches else "no candidate has this digest"
            raise ConfigurationError([f"candidate {digest!r}: {how}; choose one of {names}"])
        return matches[0]
