"""What a trainer writes and reads: published weights, and the states that a run goes on from.

Rank 0 writes published weights, and the state of ranks that hold all weights each: one file. Where each holds a part of
the weights, each writes that part of the state. Both go on with any number of ranks, however these share the weights.
"""

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from dspy_fst.engine.base import Checkpoint
from dspy_fst.errors import TrainingError
from dspy_fst.run.files import probe_for
from dspy_fst.slow.adamw import restore_moments
from dspy_fst.slow.checkpoint import (
    CheckpointWriter,
    parts_digest,
    read_state,
    restore_generators,
    restore_weights,
    state_tensors,
    stored_shapes,
    write_state,
    write_state_in_parts,
)
from dspy_fst.slow.micro_batch_budget import MicroBatchBudget
from dspy_fst.slow.model import Policy
from dspy_fst.slow.ranks.ranks import Ranks, on_all_holders, on_all_ranks
from dspy_fst.slow.ranks.sharding import gathered
from dspy_fst.types import WeightsVersion


class TrainerFiles:
    """The part of a `Trainer` that deals with the disk. The trainer sets these:"""

    ranks: Ranks
    sharded: bool
    """Whether each rank holds a part of the weights and moments alone."""
    _policy: Policy
    _optimizer: torch.optim.Optimizer
    _updates: int
    _budget: MicroBatchBudget
    _tokenizer: PreTrainedTokenizerBase
    _dtype: torch.dtype
    _device: torch.device
    _adapters: Mapping[str, str]
    _source: str | Path
    _files: Path
    """Where the model's own files lie."""

    def publish(self, directory: Path, version: WeightsVersion) -> Checkpoint:
        """Write the weights as the new folder ``directory``, for an engine to serve: untied, and whole or absent.

        A LoRA adapter alone is written, and beside ``directory`` the base that all versions share, if it is not there.

        Raises:
            TrainingError: ``directory`` exists.
        """
        if not self._policy.adapters:
            return Checkpoint(version, Path(directory), self._checkpoints.write(Path(directory)))
        return self._checkpoints.write_adapters(Path(directory), version, self._policy.adapters, self._adapters)

    @cached_property
    def _checkpoints(self) -> CheckpointWriter:
        return CheckpointWriter(self._policy.model, self._tokenizer, self._dtype, self._files, self._whole_weights)

    @on_all_holders
    def _whole_weights(self, adapter: str | None) -> dict[str, Tensor]:
        """See `Policy.tensors`; on rank 0."""
        tensors = self._policy.tensors(adapter)
        return gathered(tensors, keep=self.ranks.rank == 0) if self.sharded else tensors

    def check_folder(self, run_dir: Path) -> None:
        """Whether all ranks that will write there can.

        Raises:
            TrainingError: one does not see the folder, or may not write.
        """
        if self.sharded:
            with probe_for(run_dir.absolute()) as probe:
                self._check_probe(probe, probe.read_text(encoding="utf-8"))

    @on_all_ranks
    def _check_probe(self, probe: Path, content: str) -> None:
        self.ranks.check_writes(probe, content)

    def save_state(self, directory: Path) -> None:
        """Write weights, AdamW's moments, the number of updates and torch's generators; see `write_state`.

        Ranks that share the weights write a part of it each; see `write_state_in_parts`.
        """
        self.state_writer()(directory)

    def state_writer(self) -> Callable[[Path], None]:
        """:meth:`save_state` for another thread. Nothing may change before it has returned."""
        facts = {"updates": self._updates, **self._budget.facts}
        if self.sharded:
            return partial(write_state_in_parts, write=self._begin_parts(), facts=facts)
        return partial(write_state, tensors=self._state(), facts=facts)

    def _state(self) -> dict[str, Tensor]:
        return state_tensors(self._policy.trained, self._optimizer, self._device)

    @on_all_ranks
    def _begin_parts(self) -> Callable[[Path], None]:
        """See `Ranks.in_parts`. What no rank has a share of is rank 0's: AdamW's steps and torch's generators."""
        own = {name: one for name, one in self._state().items() if isinstance(one, DTensor) or self.ranks.rank == 0}
        return self.ranks.in_parts(own)

    @on_all_ranks
    @torch.inference_mode(False)
    def load_state(self, directory: Path) -> None:
        """Restore what :meth:`save_state` wrote; the reference is unchanged.

        Training then continues bit for bit on a CPU, and on a GPU up to the order in which its kernels add up.

        Raises:
            TrainingError: the state is unreadable, of a model with other parameters, or not the same on every rank.
        """
        tensors, facts = self._read(directory)
        if stored_shapes(tensors) != self._shapes:
            raise TrainingError(f"{directory} holds the state of another model; start from the model it was saved with")
        restore_weights(tensors, self._policy.trained)
        restore_moments(tensors, self._policy.trained, self._optimizer)
        restore_generators(tensors, self._device)
        self._updates = facts["updates"]
        self._budget.restore(facts)

    @on_all_ranks
    @torch.inference_mode(False)
    def load_optimizer(self, directory: Path) -> list[str]:
        """Load AdamW's moments and the number of updates from another run's :meth:`save_state`, but no weights.

        Returns:
            The parameters that the state does not hold, and that therefore start without moments. A head that was tied
            to the embedding in that run is one: it became a parameter of its own when it was published.

        Raises:
            TrainingError: as `load_state` has it.
        """
        tensors, facts = self._read(directory)
        stored = stored_shapes(tensors)
        if not stored.items() <= self._shapes.items():
            raise TrainingError(f"{directory} holds the state of another model than {self._source}")
        restore_moments(tensors, self._policy.trained, self._optimizer)
        self._updates = facts["updates"]
        return [name for name in self._policy.trained if name not in stored]

    def _read(self, directory: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
        self.ranks.check_alike(parts_digest(Path(directory)), directory)
        tensors, facts = read_state(Path(directory), self._policy.trained)
        weights = [own for name, own in tensors.items() if name.startswith("weights/")]
        self.ranks.check_same([own for own in weights if not isinstance(own, DTensor)], directory)
        return tensors, facts

    @property
    def _shapes(self) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in self._policy.trained.items()}
