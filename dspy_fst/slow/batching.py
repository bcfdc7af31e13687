"""Recorded calls become token sequences, and these are cut into micro-batches within a token budget. Pure.

A batch is a tree: the candidates' system messages, then the problems, then the replies. What sequences have in common
at their beginning is read once, at any depth.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from dspy_fst.engine.tree import Ids, Tree, padded, trees
from dspy_fst.errors import NotFiniteError, TrainingError
from dspy_fst.slow.losses.loss import Tokens
from dspy_fst.types import Call, Row, SeedKLCall

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


def read_by_start(policy_reads: Sequence[Scored], calls: Sequence[SeedKLCall]) -> list[Scored]:
    """The sequences of seed-KL calls as the start reads them: the same completions, after prompts of its own."""
    return [
        replace(sequence, ids=(*c.start_prompt_ids, *c.call.completion_ids), start=len(c.start_prompt_ids))
        for sequence, c in zip(policy_reads, calls, strict=True)
    ]


def tokens_of(rows: Sequence[Row], device: torch.device) -> Tokens:
    """The values of rows, repeated for their N completion tokens."""
    lengths = torch.tensor([len(row.completion_ids) for row in rows])
    advantages = torch.tensor([row.advantage for row in rows], dtype=torch.float32).repeat_interleave(lengths)
    weights = torch.tensor([row.token_weight for row in rows], dtype=torch.float32).repeat_interleave(lengths)
    behaviour = torch.tensor([logprob for row in rows for logprob in row.logprobs], dtype=torch.float32)
    return Tokens(behaviour.to(device), advantages.to(device), weights.to(device))


def part_of(tokens: Tokens, part: slice) -> Tokens:
    """Some of the tokens."""
    of_replies = None if tokens.reply_log_ratios is None else tokens.reply_log_ratios[part]
    return Tokens(tokens.behaviour[part], tokens.advantages[part], tokens.weights[part], of_replies)


def with_reply_log_ratios(tokens: Tokens, logprobs: Tensor, lengths: Sequence[int]) -> Tokens:
    """The same tokens with the mean log-ratio of their reply.

    Args:
        logprobs: log pi_theta of the tokens, shape (N,), without a gradient.
        lengths: Tokens of each reply; they sum to N.
    """
    means = [part.mean() for part in (logprobs - tokens.behaviour).split(list(lengths))]
    repeats = torch.tensor(lengths, device=logprobs.device)
    return replace(tokens, reply_log_ratios=torch.stack(means).repeat_interleave(repeats))


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
    """Group the sequences that are read as one, because each is the beginning of the next: turns of a loop, or doubles.

    A causal model scores a turn without looking at what follows, so reading the last turn scores all of them. Each turn
    keeps its own scored tokens and temperature. The tokens read then grow linearly with the turns, not quadratically.

    Returns:
        Chains of indices, shortest sequence first. Every sequence is in exactly one chain.
    """
    found: list[list[int]] = []
    longest: Ids | None = None
    # Whatever begins with a sequence follows it in this order, without a gap.
    for index in sorted(range(len(sequences)), key=lambda i: (_read(sequences[i]), i), reverse=True):
        ids = _read(sequences[index])
        if longest is not None and longest[: len(ids)] == ids:
            found[-1].insert(0, index)
        else:
            found.append([index])
            longest = ids
    return found[::-1]


def _read(sequence: Scored) -> Ids:
    """What the model reads to score it: nothing follows the last token."""
    return sequence.ids[:-1]


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that are read in one pass: as the rows of a matrix, or as a tree that holds each beginning once.

    Rows are padded on the right. Then a causal model needs neither position ids nor an attention mask. Real tokens keep
    their positions and never attend to the padding, and attention takes its fast causal path. A tree has no padding.
    """

    members: tuple[int, ...]
    """Index of each sequence in the list that was cut. The sequences of a chain (see `chains`) are adjacent."""
    tokens: tuple[int, ...]
    """Number of scored tokens of each member; sums to N."""
    row_tokens: int
    """Number of tokens of all members, each by itself."""
    chains: int
    """Number of texts that the members are read as."""
    ids: Tensor
    """Shape (chains, longest text); of a tree (1, T), each text behind the texts that it continues."""
    tree: Tree | None
    predict_at: Tensor
    """Shape (N,): position that predicts each scored token, counted over the flattened ids."""
    targets: Tensor
    """Shape (N,): the scored tokens, member by member."""
    temperatures: Tensor
    """Shape (N,): temperature of each scored token."""
    adapter: str | None = None
    """Of all its sequences, see `Scored`."""
    padding: bool = False
    """Whether it is read for the sake of other ranks alone, and nothing is learnt or measured."""

    @property
    def tokens_read(self) -> int:
        """Tokens that the model reads, padding included."""
        return self.ids.numel()

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch with its tensors on the device."""
        return replace(
            self,
            ids=self.ids.to(device),
            tree=None if self.tree is None else self.tree.to(device),
            predict_at=self.predict_at.to(device),
            targets=self.targets.to(device),
            temperatures=self.temperatures.to(device),
        )


def micro_batches(sequences: Sequence[Scored], budget: int, *, share: bool) -> Iterator[MicroBatch]:
    """Cut sequences so that each micro-batch reads at most ``budget`` tokens, padding included.

    Sequences of different LoRA adapters are never in one. Those that continue each other are read as one (see
    `chains`). A chain longer than the budget is a micro-batch by itself. The largest micro-batches come first: if
    memory runs out, it does so in the first one.

    Args:
        share: Read what sequences have in common at their beginning once.
    """
    for adapter in dict.fromkeys(sequence.adapter for sequence in sequences):
        own = [index for index, sequence in enumerate(sequences) if sequence.adapter == adapter]
        for micro in _of_one_adapter([sequences[index] for index in own], budget, share):
            yield replace(micro, members=tuple(own[member] for member in micro.members), adapter=adapter)


def in_rounds(cut: Iterable[MicroBatch], rank: int, world: int) -> Iterator[MicroBatch]:
    """A rank's share, where all have the same number: those that get none in the last round read its last one, too."""
    number = 0
    for number, micro in enumerate(cut, 1):
        if (number - 1) % world == rank:
            yield micro
    if 0 < number % world <= rank:
        yield replace(micro, padding=True)


def _of_one_adapter(sequences: Sequence[Scored], budget: int, share: bool) -> Iterator[MicroBatch]:
    found = chains(sequences)
    texts = [_read(sequences[chain[-1]]) for chain in found]
    if not share:
        for rows in _rows_within(texts, budget):
            yield _in_rows(sequences, [found[i] for i in rows], [texts[i] for i in rows])
        return
    for part, ids, places, tree in trees(texts, budget):
        yield _micro_batch(sequences, [found[i] for i in part], ids, places, tree)


def _micro_batch(
    sequences: Sequence[Scored],
    found: Sequence[Sequence[int]],
    ids: Tensor,
    places: Sequence[Sequence[int]],
    tree: Tree | None = None,
) -> MicroBatch:
    """
    Args:
        found: The chains that it reads.
        places: Where the tokens of each chain's text stand among the flattened ids.
    """
    members = [(member, where) for chain, where in zip(found, places, strict=True) for member in chain]
    chosen = [sequences[member] for member, _ in members]
    at = [where[s.start - 1 : len(s.ids) - 1] for s, (_, where) in zip(chosen, members, strict=True)]
    return MicroBatch(
        members=tuple(member for member, _ in members),
        tokens=tuple(sequence.tokens for sequence in chosen),
        row_tokens=sum(len(sequence.ids) for sequence in chosen),
        chains=len(found),
        ids=ids,
        tree=tree,
        predict_at=torch.tensor([place for part in at for place in part], dtype=torch.long),
        targets=torch.tensor([token for s in chosen for token in s.ids[s.start :]], dtype=torch.long),
        temperatures=torch.tensor([s.temperature for s in chosen for _ in range(s.tokens)], dtype=torch.float32),
    )


def _rows_within(texts: Sequence[Ids], budget: int) -> Iterator[list[int]]:
    part: list[int] = []
    for index in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
        if part and (len(part) + 1) * len(texts[part[0]]) > budget:
            yield part
            part = []
        part.append(index)
    yield part


def _in_rows(sequences: Sequence[Scored], found: Sequence[Sequence[int]], texts: Sequence[Ids]) -> MicroBatch:
    ids = padded(texts)
    width = ids.shape[1]
    return _micro_batch(sequences, found, ids, [range(row * width, (row + 1) * width) for row in range(len(texts))])
