"""Recorded calls become token sequences, and these are cut into micro-batches within a token budget. Pure.

A prefix that sequences share is read once.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from dspy_fst.errors import NotFiniteError, TrainingError
from dspy_fst.types import Call, Row

Ids = tuple[int, ...]
NONE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Scored:
    """A token sequence and where its scored part begins.

    Tokens ``ids[start:]`` are scored, each from all tokens before it. Example: ``Scored((5, 6, 7, 8), start=2)`` scores
    7 and 8.
    """

    ids: Ids
    start: int
    temperature: float = 1.0
    """Divides the logits of the scored tokens; the temperature at which they were sampled."""
    adapter: str | None = None
    """The LoRA adapter that it is read with, where the policy has several."""

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return len(self.ids) - self.start


def completions(calls: Sequence[Call] | Sequence[Row], adapters: Mapping[str, str] = NONE) -> list[Scored]:
    """Each call as a sequence whose completion is scored at the call's temperature.

    Args:
        adapters: Predictor -> the LoRA adapter of its calls.
    """
    return [
        Scored(
            (*call.prompt_ids, *call.completion_ids),
            len(call.prompt_ids),
            call.temperature,
            adapters.get(call.predictor),
        )
        for call in calls
    ]


def check_recorded(rows: Sequence[Row]) -> None:
    """Check that every row has one finite log-probability per completion token.

    Raises:
        TrainingError: a row has more or fewer log-probabilities than tokens.
        NotFiniteError: a log-probability is not finite.
    """
    for index, row in enumerate(rows):
        who = f"call {index} ({row.predictor or 'unnamed'})"
        if len(row.logprobs) != len(row.completion_ids):
            raise TrainingError(
                f"{who} has {len(row.logprobs)} log-probabilities for its {len(row.completion_ids)} tokens; the engine "
                "must record the ones it sampled with"
            )
        if not all(map(math.isfinite, row.logprobs)):
            raise NotFiniteError(f"{who} was recorded with a log-probability that is not finite")


def check_scorable(sequences: Sequence[Scored], *, vocabulary: int, last_position: int | None) -> None:
    """Check that a model can score the sequences. On a GPU others would fail an assertion and kill the process.

    Args:
        vocabulary: Every token id must be smaller.
        last_position: Highest position that the model reads; None: no limit.

    Raises:
        TrainingError: a sequence cannot be scored.
    """
    for index, sequence in enumerate(sequences):
        if not sequence.temperature > 0:
            raise TrainingError(
                f"call {index} was sampled at temperature {sequence.temperature}, which has no gradient"
            )
        if sequence.start < 1:
            raise TrainingError(f"call {index} has no prompt, so its first token cannot be scored")
        if last_position is not None and len(sequence.ids) > last_position + 1:
            raise TrainingError(
                f"call {index} has {len(sequence.ids)} tokens, and the model reads {last_position + 1} at most; lower "
                "max_tokens or shorten the prompt"
            )
        if min(sequence.ids) < 0 or max(sequence.ids) >= vocabulary:
            raise TrainingError(
                f"call {index} has token ids outside 0..{vocabulary - 1}: it was sampled from another model"
            )


def chains(sequences: Sequence[Scored]) -> list[list[int]]:
    """Group the sequences that can be read as one: turns of a loop whose prompts each begin with the turn before.

    A causal model scores a turn without looking at what follows, so reading the last turn scores all of them. Each turn
    keeps its own scored tokens and temperature. The tokens read then grow linearly with the turns, not quadratically.

    Returns:
        Chains of indices, first turn first. Every sequence is in exactly one chain.
    """
    found: list[list[int]] = []
    begun: list[list[int]] = []  # chains that the current sequence begins with, shortest first

    def last(chain: list[int]) -> Ids:
        return sequences[chain[-1]].ids

    for index in sorted(range(len(sequences)), key=lambda i: sequences[i].ids):
        ids, start = sequences[index].ids, sequences[index].start
        while begun and ids[: len(last(begun[-1]))] != last(begun[-1]):
            begun.pop()
        if place := bisect_right(begun, start, key=lambda chain: len(last(chain))):
            chain = begun.pop(place - 1)
        else:
            found.append(chain := [])
        chain.append(index)
        begun.append(chain)
    return found


@dataclass(frozen=True)
class _Reading:
    """What the model reads for a chain: a prefix, which other chains may share, and a suffix of its own."""

    members: tuple[int, ...]
    prefix: Ids
    suffix: Ids

    @classmethod
    def of(cls, chain: Sequence[int], sequences: Sequence[Scored], share: bool) -> "_Reading":
        ids = sequences[chain[-1]].ids[:-1]  # nothing follows the last token
        cut = sequences[chain[0]].start if share else len(ids)
        return cls(tuple(chain), ids[:cut], ids[cut:])


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of similar length, each read as a prefix and a suffix (possibly empty), both padded on the right.

    With padding on the right a causal model needs neither position ids nor an attention mask for the prefixes. Real
    tokens keep their positions and never attend to the padding, and attention takes its fast causal path.
    """

    members: tuple[int, ...]
    """Index of each sequence in the list that was cut. The sequences of a chain (see `chains`) are adjacent."""
    tokens: tuple[int, ...]
    """Number of scored tokens of each member; sums to N."""
    prefix_ids: Tensor
    """Shape (prefixes, longest prefix): the distinct prefixes."""
    prefix_lengths: Tensor
    """Shape (prefixes,)."""
    prefix_of: Tensor
    """Shape (chains,): the prefix of each chain."""
    suffix_ids: Tensor
    """Shape (chains, longest suffix); the width is 0 when no chain has a suffix."""
    predict_at: Tensor
    """Shape (N,): position that predicts each scored token, counted over the flattened prefixes, then suffixes."""
    targets: Tensor
    """Shape (N,): the scored tokens, member by member."""
    temperatures: Tensor
    """Shape (N,): temperature of each scored token."""
    adapter: str | None = None
    """Of all its sequences, see `Scored`."""

    @property
    def tokens_read(self) -> int:
        """Tokens that the model reads, padding included."""
        return self.prefix_ids.numel() + self.suffix_ids.numel()

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch with its tensors on the device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return MicroBatch(members=self.members, tokens=self.tokens, adapter=self.adapter, **moved)


def micro_batches(sequences: Sequence[Scored], budget: int, *, share: bool) -> Iterator[MicroBatch]:
    """Cut sequences so that each micro-batch reads at most ``budget`` tokens, padding included.

    Sequences of different LoRA adapters are never in one. Those that continue each other are read as one (see
    `chains`). A chain longer than the budget is a micro-batch
    by itself. The longest prefixes come first: if memory runs out, it does so in the first micro-batch.

    Args:
        share: Read a prompt that several sequences share once, if that reduces the tokens read. It may increase them,
            when completions of very different lengths end up in one micro-batch.
    """
    for adapter in dict.fromkeys(sequence.adapter for sequence in sequences):
        own = [index for index, sequence in enumerate(sequences) if sequence.adapter == adapter]
        for micro in _of_one_adapter([sequences[index] for index in own], budget, share):
            yield replace(micro, members=tuple(own[member] for member in micro.members), adapter=adapter)


def _of_one_adapter(sequences: Sequence[Scored], budget: int, share: bool) -> Iterator[MicroBatch]:
    found = chains(sequences)
    ways = [[_Reading.of(chain, sequences, way) for chain in found] for way in ((False, True) if share else (False,))]
    for chunk in min((_cut(way, budget) for way in ways), key=lambda chunks: sum(chunk.size for chunk in chunks)):
        yield _micro_batch(sequences, chunk.readings)


class _Chunk:
    """A micro-batch while it is filled. Readings are added in order of decreasing prefix length."""

    def __init__(self) -> None:
        self.readings: list[_Reading] = []
        self._prefixes: set[Ids] = set()
        self._longest_prefix = self._longest_suffix = 0

    @property
    def size(self) -> int:
        """Tokens to read, padding included."""
        return len(self._prefixes) * self._longest_prefix + len(self.readings) * self._longest_suffix

    def size_with(self, reading: _Reading) -> int:
        prefixes = len(self._prefixes) + (reading.prefix not in self._prefixes)
        longest = max(self._longest_suffix, len(reading.suffix))
        return prefixes * max(self._longest_prefix, len(reading.prefix)) + (len(self.readings) + 1) * longest

    def add(self, reading: _Reading) -> None:
        self.readings.append(reading)
        self._prefixes.add(reading.prefix)
        self._longest_prefix = max(self._longest_prefix, len(reading.prefix))
        self._longest_suffix = max(self._longest_suffix, len(reading.suffix))


def _cut(readings: Sequence[_Reading], budget: int) -> list[_Chunk]:
    chunks = [_Chunk()]
    for reading in sorted(readings, key=lambda r: (-len(r.prefix), r.prefix, -len(r.suffix))):
        if chunks[-1].readings and chunks[-1].size_with(reading) > budget:
            chunks.append(_Chunk())
        chunks[-1].add(reading)
    return [chunk for chunk in chunks if chunk.readings]


def _micro_batch(sequences: Sequence[Scored], readings: Sequence[_Reading]) -> MicroBatch:
    rows = {prefix: row for row, prefix in enumerate(dict.fromkeys(reading.prefix for reading in readings))}
    prefix_ids, suffix_ids = _padded(list(rows)), _padded([reading.suffix for reading in readings])
    predict_at = []
    for number, reading in enumerate(readings):
        # The token before a scored one predicts it. It is in the prefix, or in this chain's own suffix.
        in_prefix = rows[reading.prefix] * prefix_ids.shape[1]
        in_suffix = prefix_ids.numel() + number * suffix_ids.shape[1] - len(reading.prefix)
        for member in reading.members:
            before = range(sequences[member].start - 1, len(sequences[member].ids) - 1)
            predict_at += [at + (in_prefix if at < len(reading.prefix) else in_suffix) for at in before]
    members = tuple(member for reading in readings for member in reading.members)
    chosen = [sequences[member] for member in members]
    return MicroBatch(
        members=members,
        tokens=tuple(sequence.tokens for sequence in chosen),
        prefix_ids=prefix_ids,
        prefix_lengths=torch.tensor([len(prefix) for prefix in rows]),
        prefix_of=torch.tensor([rows[reading.prefix] for reading in readings]),
        suffix_ids=suffix_ids,
        predict_at=torch.tensor(predict_at),
        targets=torch.tensor([token for sequence in chosen for token in sequence.ids[sequence.start :]]),
        temperatures=torch.tensor(
            [sequence.temperature for sequence in chosen for _ in range(sequence.tokens)], dtype=torch.float32
        ),
    )


def _padded(rows: Sequence[Ids]) -> Tensor:
    """Pad rows on the right with id 0. No result depends on the padding, so any id of the vocabulary will do."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long)
