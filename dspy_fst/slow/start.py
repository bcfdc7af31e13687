"""The weights that the KL is measured to."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dspy_fst.slow.batching import MicroBatch, Scored
from dspy_fst.slow.head import Readout
from dspy_fst.slow.model import Policy
from dspy_fst.slow.ranks.sharding import let_go

Cut = Callable[[list[Scored]], Iterable[MicroBatch]]
"""Sequences -> micro-batches on the trainer's device."""


class Start:
    """The frozen reference of the KL term, read from disk when it is first used.

    Args:
        policy: That is trained.
        path: The weights of the term.
        own: Whether they are those that the policy was read from. With LoRA adapters that needs no second model.
        cut: Of the trainer.
        place: Puts a policy on the trainer's device, where the trainer's own is.
    """

    def __init__(self, policy: Policy, path: str | Path, *, own: bool, cut: Cut, place: Callable[[Policy], None]):
        self._policy, self._path, self._own, self._cut, self._place = policy, path, own, cut, place

    @cached_property
    @torch.inference_mode(False)
    def policy(self) -> Policy:
        if self._own and self._policy.adapters:
            return self._policy.start
        policy = Policy.load(self._path, dtype=self._policy.body_dtype, trainable=False)
        self._policy.check_same_model(policy, self._path)
        self._place(policy)
        return policy

    def let_go(self) -> None:
        """The readout that was asked for last is used no more."""
        if "policy" in vars(self):
            let_go(self.policy)

    @torch.no_grad()
    def reads(self, micro: MicroBatch, other: Sequence[Scored] | None = None) -> Readout:
        """What the start makes of a micro-batch.

        Args:
            other: The sequence that the start reads instead of each member, with the same scored tokens. They are cut
                into micro-batches of their own: the start's prompts may be far longer than the policy's, so the
                policy's micro-batch of the same calls could exceed the budget. None: it reads the micro-batch itself.
        """
        if other is None:
            return self.policy.readout(micro)
        parts: dict[int, Tensor] = {}
        for own in self._cut(list(other)):
            readout = self.policy.readout(own)
            parts |= dict(zip(own.members, readout.hidden.split(own.tokens), strict=True))
        return replace(readout, hidden=torch.cat([parts[index] for index in range(len(other))]))
