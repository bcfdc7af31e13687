"""Samples replies to a batch of calls with a transformers model. Every row has its own seed.

Calls are cut into batches within a token budget, and identical prompts are read once. The engine
(`dspy_fst.engine.in_process`) decides which calls wait for one batch; this file knows neither threads nor requests.

The model decodes prompt by prompt and then token by token, in the fastest way that is right for it. Most models read
prompts of different lengths side by side, padded on the left, and cache keys and values. Recurrent layers (Mamba, gated
delta nets, short convolutions) would carry padding through their state, so those models read one length at a time. A
model with a cache of another kind rereads the whole text for every token: slow, but right.
"""

import inspect
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dspy_fst.errors import EngineError
from dspy_fst.model_files.architectures import last_position
from dspy_fst.types import WeightsVersion

# ---- how a model decodes -------------------------------------------------------------------------


TOLERANCE, STATE_TOLERANCE = 1e-3, 5e-5
"""Largest relative gap between a way of decoding and the plain forward, in float32, where kernels differ by 1e-6.

A fault in cached keys and values shows at the size of the logits. Recurrent layers may always be off by a little:
Zamba 2 and Nemotron-H bound the time step when they read a text, but not when they read a token (1e-4; 1e-2 nats).
"""
Ids = tuple[int, ...]


class Decoding(Protocol):
    """Rows of text that grow by one token at a time."""

    logits: Tensor
    """Logits of each row's next token, shape (rows, vocabulary), float32."""

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; a row may be taken several times."""

    @abstractmethod
    def append(self, tokens: Tensor) -> None:
        """Read one more token in each row; ``tokens`` has shape (rows,)."""


class BatchDecoder:
    """A model and the way in which it decodes a batch, chosen by a probe when the model is given.

    Args:
        model: On its device, in eval mode.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._parameters = set(inspect.signature(model.forward).parameters)
        self._cache_parameter = "past_key_values" if "past_key_values" in self._parameters else "cache_params"
        self._last_position = last_position(model.config)
        self.keeps_cache = self._cache_parameter in self._parameters and self._has_plain_cache()
        """Whether keys and values (or states) are kept between tokens."""
        self.equal_lengths_only = False
        """Whether the prompts of a batch must have one length."""
        self.adapters: list[str | None] = []
        """The LoRA adapter of each row that is read next; who has a batch of several reads it (`lora.using_by_row`)."""
        if self.keeps_cache:
            self._choose()

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def prefill(self, prompts: Sequence[Ids]) -> Decoding:
        """Read prompts; they must have one length if `equal_lengths_only`."""
        return _CachedDecoding(self, prompts) if self.keeps_cache else _UncachedDecoding(self, prompts)

    def forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, cache: DynamicCache | None) -> Tensor:
        """Logits, shape (rows, kept positions, vocabulary): of the last position with a cache, else of all."""
        options: dict[str, object] = {"attention_mask": mask}
        if positions is not None and "position_ids" in self._parameters:
            options["position_ids"] = positions.clamp(min=0, max=self._last_position)
        if cache is not None:
            options[self._cache_parameter] = cache
            options |= {"logits_to_keep": 1} if "logits_to_keep" in self._parameters else {}
        logits: Tensor = self.model(input_ids=ids, use_cache=cache is not None, **options).logits
        return logits

    def _has_plain_cache(self) -> bool:
        try:
            layers = DynamicCache(config=self.model.config).layers
        except Exception:  # the config describes layers that transformers has no cache for
            return False
        return all(hasattr(layer, "reorder_cache") for layer in layers)

    @torch.no_grad()
    def _choose(self) -> None:
        """Choose the first way of decoding whose logits are those of plain forwards.

        In bfloat16 rounding alone is as large as some faults, so there the kinds of layers decide.
        """
        layers = DynamicCache(config=self.model.config).layers
        self.equal_lengths_only = not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        if self.model.dtype != torch.float32 or (not self.equal_lengths_only and self._agrees()):
            return
        self.equal_lengths_only = True
        self.keeps_cache = self._agrees()
        self.equal_lengths_only = self.keeps_cache

    def _agrees(self) -> bool:
        """Whether decoding two short texts gives the logits of plain forwards."""
        size = cast(nn.Embedding, self.model.get_input_embeddings()).num_embeddings
        texts = [(3, 1, 4, 1, 5, 9, 2, 6), (2, 7, 1, 8, 2, 8, 1, 8) if self.equal_lengths_only else (2, 7, 1, 8, 2)]
        try:
            gap = self._gap([tuple(token % size for token in text) for text in texts])
        except Exception:  # a model's own code may refuse such a batch in any way
            return False
        return gap <= (STATE_TOLERANCE if self.equal_lengths_only else TOLERANCE)

    def _gap(self, texts: list[Ids]) -> float:
        """Largest gap of the last three tokens' logits, relative to their size.

        The rows change places and one of them is doubled, as it happens in a batch.
        """
        decoding = self.prefill([text[:-2] for text in texts])
        rows = torch.tensor([1, 0, 1], device=self.device)
        decoding.select(rows)
        selected = [texts[row] for row in rows.tolist()]
        steps = [decoding.logits]
        for place in (-2, -1):
            decoding.append(torch.tensor([text[place] for text in selected], device=self.device))
            steps.append(decoding.logits)
        gaps = []
        for row, text in enumerate(selected):
            plain = self.forward(torch.tensor([text], device=self.device), None, None, None)[0, -3:].float()
            decoded = torch.stack([logits[row] for logits in steps])
            gaps.append(float((decoded - plain).abs().max() / plain.abs().max().clamp(min=1e-6)))
        return max(gaps)


class _CachedDecoding:
    """Prompts padded on the left; keys and values (or states) are kept."""

    logits: Tensor

    def __init__(self, decoder: BatchDecoder, prompts: Sequence[Ids]):
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padded on the left, so that the next token is last in every row
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        self._decoder, self._mask = decoder, mask.to(decoder.device)
        self._cache = DynamicCache(config=decoder.model.config)
        self._read(ids.to(decoder.device), self._mask.cumsum(-1) - 1)

    def select(self, rows: Tensor) -> None:
        # Not batch_select_indices: recurrent layers lack it, or it leaves their states as they are.
        self._cache.reorder_cache(cast(torch.LongTensor, rows))
        self.logits, self._mask = self.logits[rows], self._mask[rows]

    def append(self, tokens: Tensor) -> None:
        positions = self._mask.sum(-1, keepdim=True)
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        self._read(tokens[:, None], positions)

    def _read(self, ids: Tensor, positions: Tensor) -> None:
        mask = None if self._decoder.equal_lengths_only else self._mask
        self.logits = self._decoder.forward(ids, mask, positions, self._cache)[:, -1].float()


class _UncachedDecoding:
    """Nothing is kept: texts are padded on the right, where no real token looks, and read whole for every token."""

    logits: Tensor

    def __init__(self, decoder: BatchDecoder, prompts: Sequence[Ids]):
        self._decoder = decoder
        self._rows = [list(prompt) for prompt in prompts]
        self._read()

    def select(self, rows: Tensor) -> None:
        self._rows = [list(self._rows[row]) for row in rows.tolist()]
        self.logits = self.logits[rows]

    def append(self, tokens: Tensor) -> None:
        for row, token in zip(self._rows, tokens.tolist(), strict=True):
            row.append(token)
        self._read()

    def _read(self) -> None:
        width, device = max(map(len, self._rows)), self._decoder.device
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in self._rows], device=device)
        last = torch.tensor([len(row) - 1 for row in self._rows], device=device)
        logits = self._decoder.forward(ids, None, None, None)
        self.logits = logits[torch.arange(len(self._rows), device=device), last].float()


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
    def order(self) -> tuple[int, tuple[int, ...], str, int]:
        """Sort key, so that batches do not depend on the order of arrival."""
        return (len(self.prompt), self.prompt, self.adapter or "", self.seed)


def cut(calls: Sequence[Pending], budget: int, *, mixed: bool = False) -> list[list[Pending]]:
    """Sort calls and cut them into batches, with rows x (longest prompt + completion) within the budget.

    A call that exceeds the budget is a batch by itself.

    Args:
        mixed: Whether a batch may hold calls of several LoRA adapters and of the base.
    """
    batches: list[list[Pending]] = []
    width = 0
    for call in sorted(calls, key=lambda call: ("" if mixed else call.adapter or "", call.order)):
        width = max(width, len(call.prompt) + call.max_tokens)
        fits = batches and width * (len(batches[-1]) + 1) <= budget
        if fits and (mixed or batches[-1][0].adapter == call.adapter):
            batches[-1].append(call)
        else:
            batches.append([call])
            width = len(call.prompt) + call.max_tokens
    return batches


@torch.no_grad()
def generate(
    decoder: BatchDecoder, eos: frozenset[int], calls: Sequence[Pending], overdue: Callable[[], bool] = lambda: False
) -> list[Reply]:
    """Sample a reply to every call: ids, their log-probabilities at the call's temperature, and the finish reason.

    Identical prompts (the G/K rollouts of one candidate on one problem) are read once. Finished rows are removed from
    the batch once they are half of it.

    Args:
        decoder: The model.
        eos: Ids of the tokens that end a reply.
        calls: The batch.
        overdue: Called before each token; the batch is given up when it returns True.

    Raises:
        EngineError: the batch was given up.
    """
    replies = [Reply() for _ in calls]
    widths = {len(call.prompt) for call in calls} if decoder.equal_lengths_only else {0}
    for width in sorted(widths):
        rows = [row for row, call in enumerate(calls) if width in (0, len(call.prompt))]
        _fill([replies[row] for row in rows], decoder, eos, [calls[row] for row in rows], overdue)
    return replies


def _fill(
    replies: list[Reply], decoder: BatchDecoder, eos: frozenset[int], calls: list[Pending], overdue: Callable[[], bool]
) -> None:
    starts = list(dict.fromkeys((call.prompt, call.adapter) for call in calls))
    row_of = {start: row for row, start in enumerate(starts)}
    device = decoder.device
    decoder.adapters[:] = [adapter for _, adapter in starts]
    batch = decoder.prefill([prompt for prompt, _ in starts])
    batch.select(torch.tensor([row_of[call.prompt, call.adapter] for call in calls], device=device))
    decoder.adapters[:] = [call.adapter for call in calls]
    draws = [np.random.default_rng(call.seed).random(call.max_tokens) for call in calls]
    temperatures = torch.tensor([call.temperature for call in calls], device=device)
    live = list(range(len(calls)))  # live[i] is the index of the call in row i of the batch
    while True:
        if overdue():
            raise EngineError("the batch was given up: it ran for longer than timeout_s")
        step = [min(len(replies[call].ids), len(draws[call]) - 1) for call in live]
        uniform = torch.tensor([draws[call][n] for call, n in zip(live, step, strict=True)], dtype=torch.float64)
        tokens, logprobs = sample(batch.logits, temperatures[live], uniform.to(device))
        for call, token, logprob in zip(live, tokens.tolist(), logprobs.tolist(), strict=True):
            _append(replies[call], token, logprob, eos, calls[call].max_tokens)
        rows = [row for row, call in enumerate(live) if not replies[call].finish_reason]
        if not rows:
            return
        if 2 * len(rows) <= len(live):
            kept = torch.tensor(rows, device=device)
            batch.select(kept)
            tokens, live = tokens[kept], [live[row] for row in rows]
            decoder.adapters[:] = [calls[call].adapter for call in live]
        batch.append(tokens)


def _append(reply: Reply, token: int, logprob: float, eos: frozenset[int], max_tokens: int) -> None:
    if reply.finish_reason:
        return  # the reply is finished, and its row has not been removed yet
    reply.ids.append(token)
    reply.logprobs.append(logprob)
    if token in eos:
        reply.finish_reason = "stop"
    elif len(reply.ids) == max_tokens:
        reply.finish_reason = "length"


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
