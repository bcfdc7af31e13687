"""Cuts any number of token sequences into micro-batches of a token budget, prompts in common read once. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Scored:
    """A sequence and where its scored part begins: tokens ``ids[start:]`` are predicted from all before them."""

    ids: Ids
    start: int
    temperature: float = 1.0
    """The logits of its scored tokens are divided by this: the distribution that they were drawn from."""

    @property
    def tokens(self) -> int:
        return len(self.ids) - self.start

    def split(self, share: bool) -> tuple[Ids, Ids]:
        """What the model reads, as a prefix that others may have in common and a suffix of its own.

        The last token is in neither: nothing follows it.
        """
        return (self.ids[: self.start], self.ids[self.start : -1]) if share else (self.ids[:-1], ())


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of similar length, each a prefix and a suffix (possibly empty), both padded on the right.

    On the right a causal model needs neither position ids nor an attention mask for the prefixes: real tokens stand
    at their own positions and never look at the padding, and attention takes its fast causal path.
    """

    members: tuple[int, ...]
    """Index of each sequence in the list that was cut."""
    tokens: tuple[int, ...]
    """Scored tokens of each member; sums to N."""
    prefix_ids: Tensor
    """Shape (prefixes, longest prefix): the distinct prefixes."""
    prefix_lengths: Tensor
    """Shape (prefixes,)."""
    prefix_of: Tensor
    """Shape (members,): the prefix of each member."""
    suffix_ids: Tensor
    """Shape (members, longest suffix); of width 0 when every sequence is all prefix."""
    predict_at: Tensor
    """Shape (N,): where a scored token is predicted, counted through the flattened prefixes, then suffixes."""
    targets: Tensor
    """Shape (N,): the scored tokens, member by member."""
    temperatures: Tensor
    """Shape (N,): what the logits of each scored token are divided by."""

    def to(self, device: torch.device) -> "MicroBatch":
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return MicroBatch(members=self.members, tokens=self.tokens, **moved)


def micro_batches(sequences: Sequence[Scored], budget: int, *, share: bool) -> Iterator[MicroBatch]:
    """Cut sequences so that each micro-batch reads at most ``budget`` tokens, padding included.

    With ``share`` a prompt that several sequences begin with is read once, if that is less to read altogether: it
    can be more, when completions of very different lengths end up side by side. A sequence longer than the budget
    comes alone. Longest prefixes come first, so that memory runs out at once or not at all.
    """
    ways = [(_cut(sequences, budget, way), way) for way in ((False, True) if share else (False,))]
    chunks, shared = min(ways, key=lambda way: sum(chunk.size for chunk in way[0]))
    for chunk in chunks:
        yield _micro_batch(sequences, chunk.members, shared)


class _Chunk:
    """A micro-batch while it is filled. Members come with the longest prefix first."""

    def __init__(self) -> None:
        self.members: list[int] = []
        self._prefixes: set[Ids] = set()
        self._longest_prefix = self._longest_suffix = 0

    @property
    def size(self) -> int:
        """Tokens to read, padding included."""
        return len(self._prefixes) * self._longest_prefix + len(self.members) * self._longest_suffix

    def size_with(self, prefix: Ids, suffix: Ids) -> int:
        prefixes = len(self._prefixes) + (prefix not in self._prefixes)
        longest = max(self._longest_suffix, len(suffix))
        return prefixes * max(self._longest_prefix, len(prefix)) + (len(self.members) + 1) * longest

    def add(self, index: int, prefix: Ids, suffix: Ids) -> None:
        self.members.append(index)
        self._prefixes.add(prefix)
        self._longest_prefix = max(self._longest_prefix, len(prefix))
        self._longest_suffix = max(self._longest_suffix, len(suffix))


def _cut(sequences: Sequence[Scored], budget: int, share: bool) -> list[_Chunk]:
    parts = [sequence.split(share) for sequence in sequences]
    order = sorted(range(len(parts)), key=lambda i: (-len(parts[i][0]), parts[i][0], -len(parts[i][1])))
    chunks = [_Chunk()]
    for index in order:
        if chunks[-1].members and chunks[-1].size_with(*parts[index]) > budget:
            chunks.append(_Chunk())
        chunks[-1].add(index, *parts[index])
    return [chunk for chunk in chunks if chunk.members]


def _micro_batch(sequences: Sequence[Scored], members: Sequence[int], share: bool) -> MicroBatch:
    chosen = [sequences[i] for i in members]
    prefixes, suffixes = zip(*(sequence.split(share) for sequence in chosen), strict=True)
    rows = {prefix: row for row, prefix in enumerate(dict.fromkeys(prefixes))}
    prefix_ids, suffix_ids = _padded(list(rows)), _padded(suffixes)
    predict_at = []
    for member, (sequence, prefix) in enumerate(zip(chosen, prefixes, strict=True)):
        # The token before a scored one predicts it: in the prefix, or further on in this member's own suffix.
        in_prefix = rows[prefix] * prefix_ids.shape[1]
        in_suffix = prefix_ids.numel() + member * suffix_ids.shape[1] - len(prefix)
        before = range(sequence.start - 1, len(sequence.ids) - 1)
        predict_at += [at + (in_prefix if at < len(prefix) else in_suffix) for at in before]
    return MicroBatch(
        members=tuple(members),
        tokens=tuple(sequence.tokens for sequence in chosen),
        prefix_ids=prefix_ids,
        prefix_lengths=torch.tensor([len(prefix) for prefix in rows]),
        prefix_of=torch.tensor([rows[prefix] for prefix in prefixes]),
        suffix_ids=suffix_ids,
        predict_at=torch.tensor(predict_at),
        targets=torch.tensor([token for sequence in chosen for token in sequence.ids[sequence.start :]]),
        temperatures=torch.tensor([sequence.temperature for sequence in chosen for _ in range(sequence.tokens)]),
    )


def _padded(rows: Sequence[Ids]) -> Tensor:
    """Padding is never read, so any id of the vocabulary will do."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long)
