"""Cuts any number of token sequences into micro-batches of a token budget. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scored:
    """A sequence and where its scored part begins: tokens ``ids[start:]`` are predicted from all before them."""

    ids: tuple[int, ...]
    start: int

    @property
    def tokens(self) -> int:
        return len(self.ids) - self.start


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of similar length, padded on the right, their last token left out (nothing follows it).

    On the right a causal model needs neither position ids nor an attention mask: real tokens stand at their own
    positions and never look at the padding. Without a mask attention takes its fast causal path.
    """

    members: tuple[int, ...]
    """Index of each sequence in the list that was cut."""
    input_ids: Tensor
    """Shape (members, longest - 1)."""
    predict_at: Tensor
    """Shape (N,): positions in the flattened ``input_ids`` whose output predicts a scored token."""
    targets: Tensor
    """Shape (N,): the scored tokens, member by member."""
    tokens: tuple[int, ...]
    """Scored tokens of each member; sums to N."""


def micro_batches(sequences: Sequence[Scored], budget: int) -> Iterator[MicroBatch]:
    """Cut sequences, longest first, so that each micro-batch holds at most ``budget`` tokens, padding included.

    A sequence longer than the budget comes alone. Longest first: memory runs out at once or not at all.
    """
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))
    at = 0
    while at < len(order):
        fitting = max(1, budget // len(sequences[order[at]].ids))
        yield _micro_batch(sequences, order[at : at + fitting])
        at += fitting


def _micro_batch(sequences: Sequence[Scored], members: Sequence[int]) -> MicroBatch:
    chosen = [sequences[i] for i in members]
    width = max(len(sequence.ids) for sequence in chosen) - 1
    # Padding is never read, so any id of the vocabulary will do.
    padded = [[*s.ids[:-1], *[0] * (width + 1 - len(s.ids))] for s in chosen]
    predict_at = [row * width + t - 1 for row, s in enumerate(chosen) for t in range(s.start, len(s.ids))]
    return MicroBatch(
        members=tuple(members),
        input_ids=torch.tensor(padded, dtype=torch.long),
        predict_at=torch.tensor(predict_at, dtype=torch.long),
        targets=torch.tensor([t for s in chosen for t in s.ids[s.start :]], dtype=torch.long),
        tokens=tuple(s.tokens for s in chosen),
    )
