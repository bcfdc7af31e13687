"""Samples replies to a batch of calls with a transformers model. Every row has its own seed.

Calls are cut into batches within a token budget, and identical prompts are read once. The engine
(`dspy_fst.engine.in_process`) decides which calls wait for one batch; this file knows neither threads nor requests.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch

from dspy_fst.engine.decoding import BatchDecoder
from dspy_fst.errors import EngineError
from dspy_fst.types import WeightsVersion


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
    def order(self) -> tuple[str, int, tuple[int, ...], int]:
        """Sort key, so that batches do not depend on the order of arrival."""
        return (self.adapter or "", len(self.prompt), self.prompt, self.seed)


def cut(calls: list[Pending], budget: int) -> list[list[Pending]]:
    """Cut sorted calls into batches of one LoRA adapter, with rows x (longest prompt + completion) within the budget.

    A call that exceeds the budget is a batch by itself.
    """
    batches: list[list[Pending]] = []
    width = 0
    for call in calls:
        width = max(width, len(call.prompt) + call.max_tokens)
        fits = batches and width * (len(batches[-1]) + 1) <= budget
        if fits and batches[-1][0].adapter == call.adapter:
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
    prompts = list(dict.fromkeys(call.prompt for call in calls))
    row_of = {prompt: row for row, prompt in enumerate(prompts)}
    device = decoder.device
    batch = decoder.prefill(prompts)
    batch.select(torch.tensor([row_of[call.prompt] for call in calls], device=device))
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
