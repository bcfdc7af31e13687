"""The weights that the KL is measured to."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dspy_fst.slow.batching import MicroBatch, Scored
from dspy_fst.slow.head import Readout
from dspy_fst.slow.model import Policy

Cut = Callable[[list[Scored]], Iterator[MicroBatch]]
"""Sequences -> micro-batches on the trainer's device."""


class Start:
    """The frozen reference of the KL term, read from disk when it is first used.

    Args:
        policy: That is trained.
        path: The weights of the term.
        own: Whether they are those that the policy was read from. With LoRA adapters that needs no second model.
        cut: Of the trainer.
    """

    def __init__(self, policy: Policy, path: str | Path, *, own: bool, cut: Cut):
        self._policy, self._path, self._own, self._cut = policy, path, own, cut

    @cached_property
    @torch.inference_mode(False)
    def policy(self) -> Policy:
        if self._own and self._policy.adapters:
            return self._policy.start
        policy = Policy.load(self._path, dtype=self._policy.body_dtype, trainable=False)
        self._policy.check_same_model(policy, self._path)
        return policy.to(self._policy.model.device)

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
