"""Samples replies to calls with a transformers model, side by side. Every row has its own seed.

What prompts have in common at their beginning is read once, at any depth. Rows end and others join between two tokens.
The engine (`dspy_fst.engine.in_process`) decides which calls may join; this file knows neither threads nor requests.

The model decodes prompt by prompt and then token by token, in the fastest way that is right for it. Most models read
prompts as a tree (`dspy_fst.engine.tree`) and cache keys and values. Some read prompts of different lengths side by
side, padded on the left. Recurrent layers (Mamba, gated delta nets, short convolutions) would carry padding through
their state, so those models read one length at a time. A model with a cache of another kind rereads the whole text for
every token: slow, but right.
"""

import inspect
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Self, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from dspy_fst.engine.base import PromptTokens
from dspy_fst.engine.decoding import Decoding, DecodingChoice, Start, UncachedDecoding
from dspy_fst.engine.tree import Ids, change_states, keys_of_rows, no_mask, whole_tree
from dspy_fst.model_files.architectures import last_position
from dspy_fst.types import WeightsVersion

# ---- how a model decodes -------------------------------------------------------------------------


class BatchDecoder(DecodingChoice):
    """A model and the way in which it decodes a batch, chosen by a probe when the model is given.

    Args:
        model: On its device, in eval mode.
    """

    def __init__(self, model: PreTrainedModel):
        self._parameters = set(inspect.signature(model.forward).parameters)
        self._cache_parameter = "past_key_values" if "past_key_values" in self._parameters else "cache_params"
        self.chooses_logits = "logits_to_keep" in self._parameters
        """Whether the model can compute the logits of some positions alone."""
        self._last_position = last_position(model.config)
        self.adapters: list[str | None] = []
        """The LoRA adapter of each row that is read next; who has a batch of several reads it (`lora.using_by_row`)."""
        self.prompt_tokens = PromptTokens()
        super().__init__(model, takes_cache=self._cache_parameter in self._parameters)
        self.prompt_tokens = PromptTokens()  # without the probe's

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def prefill(self, starts: Sequence[Start]) -> Decoding:
        unique = list(dict.fromkeys(starts))
        parts = [unique]
        if self.reads_trees:  # one row of the model holds many texts, and a row has one adapter
            unique.sort(key=lambda start: start[1] or "")
            adapters = dict.fromkeys(adapter for _, adapter in unique)
            parts = [[start for start in unique if start[1] == adapter] for adapter in adapters]
        batch, *others = [self._read(part) for part in parts]
        for other in others:
            batch.join(other)
        row_of = {start: row for row, start in enumerate(unique)}
        batch.select(torch.tensor([row_of[start] for start in starts], device=self.device))
        self.prompt_tokens.in_calls += sum(len(prompt) for prompt, _ in starts)
        return batch

    def plain_logits(self, ids: Tensor) -> Tensor:
        return self.forward(ids, None, None, None)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: DynamicCache | None,
        kept: Tensor | int = 1,
        **tree: object,
    ) -> Tensor:
        """Logits, shape (rows, kept positions, vocabulary).

        Args:
            kept: How many last positions, or the indices of those whose logits are needed. All logits are given without
                a cache, and by models that cannot choose.
            tree: How the tokens of a row continue each other, where they are a tree.
        """
        options: dict[str, object] = {"attention_mask": mask, **tree}
        if positions is not None and "position_ids" in self._parameters:
            options["position_ids"] = positions.clamp(min=0, max=self._last_position)
        if cache is not None:
            options[self._cache_parameter] = cache
            options |= {"logits_to_keep": kept} if self.chooses_logits else {}
        logits: Tensor = self.model(input_ids=ids, use_cache=cache is not None, **options).logits
        return logits

    def _read(self, starts: Sequence[Start]) -> Decoding:
        prompts = [prompt for prompt, _ in starts]
        self.adapters[:] = [starts[0][1]] if self.reads_trees else [adapter for _, adapter in starts]
        if self.keeps_cache:
            return _CachedDecoding(self, prompts)
        self.prompt_tokens.read += len(prompts) * max(map(len, prompts))
        return UncachedDecoding(self, prompts)


class _CachedDecoding:
    """Keys and values (or states) are kept, those of shorter texts behind padding on the left."""

    logits: Tensor

    def __init__(self, decoder: BatchDecoder, prompts: Sequence[Ids]):
        self._decoder = decoder
        self._cache = DynamicCache(config=decoder.model.config)
        if decoder.reads_trees:
            self._read_as_tree(prompts)
            return
        ids, self._mask = _padded_left(prompts, decoder.device)
        decoder.prompt_tokens.read += ids.numel()
        self._read(ids, self._mask.cumsum(-1) - 1)

    def select(self, rows: Tensor) -> None:
        # Not batch_select_indices: recurrent layers lack it, or it leaves their states as they are.
        self._cache.reorder_cache(cast(torch.LongTensor, rows))
        self.logits, self._mask = self.logits[rows], self._mask[rows]

    def append(self, tokens: Tensor) -> None:
        positions = self._mask.sum(-1, keepdim=True)
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        self._read(tokens[:, None], positions)

    def join(self, other: Self) -> None:
        unused = int(self._mask.argmax(-1).min())  # columns that only padding is left in
        width = max(self._mask.shape[1] - unused, other._mask.shape[1])

        def both(one: Tensor, two: Tensor, axes: int = 1) -> Tensor:
            one = one.narrow(-1 - axes, unused, one.shape[-1 - axes] - unused)
            return torch.cat([pad(part, (*(0, 0) * axes, width - part.shape[-1 - axes], 0)) for part in (one, two)])

        change_states(self._cache, both, other._cache)
        self._mask = both(self._mask, other._mask, axes=0)
        self.logits = torch.cat([self.logits, other.logits])

    def _read(self, ids: Tensor, positions: Tensor) -> None:
        mask = None if self._decoder.equal_lengths_only else self._mask
        self.logits = self._decoder.forward(ids, mask, positions, self._cache)[:, -1].float()

    def _read_as_tree(self, prompts: Sequence[Ids]) -> None:
        decoder = self._decoder
        _, ids, places, tree = whole_tree(prompts)
        last = torch.tensor([where[-1] for where in places], device=decoder.device)
        ids, mask, tree = ids.to(decoder.device), no_mask(decoder.device), tree.to(decoder.device)
        logits = decoder.forward(ids, mask, tree.positions, self._cache, last, tree=tree)[0]
        self.logits = (logits if decoder.chooses_logits else logits[last]).float()
        columns, self._mask = _padded_left(places, decoder.device)
        keys_of_rows(self._cache, columns)
        decoder.prompt_tokens.read += ids.numel()


def _padded_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of equal length, so that the next token is last in each; and their mask, 0 where they were padded."""
    width = max(map(len, rows))
    filled = torch.tensor([[*[0] * (width - len(row)), *row] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return filled, (torch.arange(width, device=device) >= width - lengths[:, None]).long()


# ---- calls and their batches ---------------------------------------------------------------------


@dataclass
class Reply:
    """The tokens that were sampled for one call."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    weights: WeightsVersion = ""


@dataclass
class Pending:
    """One call that waits for its batch."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int
    adapter: str | None = None
    """The LoRA adapter that it is sampled with; None: the base."""
    reply: "Future[Reply]" = field(default_factory=Future)
    arrived_at: float = field(default_factory=time.monotonic)
    begun: threading.Event = field(default_factory=threading.Event)
    """Set when its batch begins, or when the call is answered without a batch."""
    began_at: float = 0.0
    """``time.monotonic()`` at which its batch began."""

    def __post_init__(self) -> None:
        self.reply.add_done_callback(lambda _: self.begun.set())

    @property
    def longest(self) -> int:
        """Tokens of its prompt and its longest reply."""
        return len(self.prompt) + self.max_tokens

    @property
    def order(self) -> tuple[int, tuple[int, ...], str, int]:
        """Sort key, so that batches do not depend on the order of arrival."""
        return (len(self.prompt), self.prompt, self.adapter or "", self.seed)


class SideBySide:
    """Calls that are sampled side by side. Some end and others join between two tokens.

    Args:
        decoder: The model.
        eos: Ids of the tokens that end a reply.
    """

    def __init__(self, decoder: BatchDecoder, eos: frozenset[int]):
        self._decoder, self._eos = decoder, eos
        self._rows: list[_Row] = []
        """Those of the decoding; a row that has ended is removed later."""
        self._decoding: Decoding | None = None
        self.steps = 0
        """Tokens since calls joined."""
        self.ended = 0
        """Replies that ended since then."""

    @property
    def calls(self) -> list[Pending]:
        """Those without a whole reply."""
        return [row.call for row in self._rows if not row.reply.finish_reason]

    def room_for(self, waiting: Sequence[Pending], budget: float, *, mixed: bool) -> int:
        """How many of the first waiting calls may join, with rows x (longest prompt + completion) within the budget.

        A call that exceeds the budget is sampled by itself.

        Args:
            mixed: Whether a batch may hold calls of several LoRA adapters and of the base.
        """
        calls = self.calls
        if calls and not self._decoder.joins:
            return 0
        first = [*calls, *waiting][:1]
        count, width = 0, max((call.longest for call in calls), default=0)
        for call in waiting:
            width = max(width, call.longest)
            alike = mixed or call.adapter == first[0].adapter
            level = not self._decoder.equal_lengths_only or len(call.prompt) == len(first[0].prompt)
            fits = width * (len(calls) + count + 1) <= budget or not (calls or count)
            if not (alike and level and fits):
                break
            count += 1
        return count

    @torch.no_grad()
    def admit(self, joining: Sequence[Pending]) -> None:
        """Read the prompts of calls that join. What they have in common at their beginning is read once."""
        self.steps = self.ended = 0
        if not joining:
            return
        self._keep([row for row, one in enumerate(self._rows) if not one.reply.finish_reason])
        new = self._decoder.prefill([(call.prompt, call.adapter) for call in joining])
        if self._decoding is None:
            self._decoding = new
        else:
            self._decoding.join(new)
        self._rows += [_Row.of(call) for call in joining]

    @torch.no_grad()
    def step(self) -> list[tuple[Pending, Reply]]:
        """Sample a token of every reply; the calls whose replies it ended, and these."""
        assert self._decoding is not None, "somebody has joined"
        device = self._decoder.device
        uniform = torch.tensor([row.draw for row in self._rows], dtype=torch.float64, device=device)
        temperatures = torch.tensor([row.call.temperature for row in self._rows], device=device)
        tokens, logprobs = sample(self._decoding.logits, temperatures, uniform)
        before = self._rows
        ended = [
            row
            for row, token, logprob in zip(before, tokens.tolist(), logprobs.tolist(), strict=True)
            if not row.reply.finish_reason and row.append(token, logprob, self._eos)
        ]
        self.steps, self.ended = self.steps + 1, self.ended + len(ended)
        live = [index for index, row in enumerate(before) if not row.reply.finish_reason]
        if 2 * len(live) <= len(before):
            self._keep(live)
            tokens = tokens[live]
        if live:
            self._decoder.adapters[:] = [row.call.adapter for row in self._rows]
            self._decoding.append(tokens)
        return [(row.call, row.reply) for row in ended]

    def drop(self, calls: Sequence[Pending]) -> None:
        """Give up some calls between two tokens."""
        given_up = {id(call) for call in calls}
        self._keep([index for index, row in enumerate(self._rows) if id(row.call) not in given_up])

    def _keep(self, rows: list[int]) -> None:
        if len(rows) < len(self._rows):
            self._rows = [self._rows[row] for row in rows]
            if self._decoding is not None and rows:
                self._decoding.select(torch.tensor(rows, device=self._decoder.device))
        if not rows:
            self._decoding = None


@dataclass
class _Row:
    """A call and what was sampled for it."""

    call: Pending
    draws: list[float]
    """One number in [0, 1) for each token."""
    reply: Reply = field(default_factory=Reply)

    @classmethod
    def of(cls, call: Pending) -> "_Row":
        return cls(call, np.random.default_rng(call.seed).random(call.max_tokens).tolist())

    @property
    def draw(self) -> float:
        """The next token's number; any for a row that has ended and was not removed yet."""
        return self.draws[min(len(self.reply.ids), len(self.draws) - 1)]

    def append(self, token: int, logprob: float, eos: frozenset[int]) -> bool:
        """Whether the reply ends with this token."""
        reply = self.reply
        reply.ids.append(token)
        reply.logprobs.append(logprob)
        if token in eos:
            reply.finish_reason = "stop"
        elif len(reply.ids) == self.call.max_tokens:
            reply.finish_reason = "length"
        return bool(reply.finish_reason)


def generate(decoder: BatchDecoder, eos: frozenset[int], calls: Sequence[Pending]) -> list[Reply]:
    """Sample a reply to every call, all at once if the model can: ids, log-probabilities at the call's temperature, and
    the finish reason.
    """
    waiting = sorted(calls, key=lambda call: call.order)
    replies: dict[int, Reply] = {}
    batch = SideBySide(decoder, eos)
    while waiting or batch.calls:
        count = batch.room_for(waiting, math.inf, mixed=True)
        batch.admit(waiting[:count])
        del waiting[:count]
        replies |= {id(call): reply for call, reply in batch.step()}
    return [replies[id(call)] for call in calls]


def sample(
    logits: torch.Tensor, temperatures: torch.Tensor, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token per row by inverting the cumulative distribution at ``uniform``; temperature 0 is the argmax.

    Args:
        logits: (rows, vocabulary), float32.
        temperatures: (rows,).
        uniform: (rows,) float64 in [0, 1).

    Returns:
        Token ids, and their log-probabilities under the distribution sampled from, both of shape (rows,).
    """
    greedy = temperatures == 0
    logprobs = (logits / torch.where(greedy, 1.0, temperatures)[:, None]).log_softmax(-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    # Scaled by the total: rounding may leave the total just under 1, and a draw above it would select no token.
    tokens = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    tokens = torch.where(greedy, logits.argmax(-1), tokens.clamp(max=logits.shape[-1] - 1))
    chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
    return tokens, torch.where(greedy, 0.0, chosen)
