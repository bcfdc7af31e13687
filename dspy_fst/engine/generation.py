"""Samples replies for a batch of prompts with a transformers model: cut to a budget, read once, seeded by row.

The engine (`dspy_fst.engine.in_process`) decides which calls make a batch; nothing here knows of threads or requests.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from dspy_fst.errors import EngineError
from dspy_fst.types import WeightsVersion


@dataclass
class Reply:
    """What was sampled for one call."""

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
    reply: "Future[Reply]" = field(default_factory=Future)
    arrived_at: float = field(default_factory=time.monotonic)
    begun: threading.Event = field(default_factory=threading.Event)
    """Set when its batch begins, or when it is answered without one."""
    began_at: float = 0.0
    """``time.monotonic()`` of the batch's beginning."""

    def __post_init__(self) -> None:
        self.reply.add_done_callback(lambda _: self.begun.set())

    @property
    def order(self) -> tuple[int, tuple[int, ...], int]:
        return (len(self.prompt), self.prompt, self.seed)


def cut(calls: list[Pending], budget: int) -> list[list[Pending]]:
    """Split sorted calls so that rows x (longest prompt + longest completion) stays within the budget."""
    batches: list[list[Pending]] = []
    width = 0
    for call in calls:
        width = max(width, len(call.prompt) + call.max_tokens)
        if batches and width * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(call)
        else:
            batches.append([call])
            width = len(call.prompt) + call.max_tokens
    return batches


@torch.no_grad()
def generate(
    model: Any, eos: frozenset[int], calls: Sequence[Pending], overdue: Callable[[], bool] = lambda: False
) -> list[Reply]:
    """Sample a reply for every call: ids, their log-probabilities at the call's temperature, finish reason.

    Identical prompts (the G/K rollouts of one candidate on one problem) are read once. Rows that have
    finished leave the batch when half of it is done.

    Args:
        overdue: Asked before each token; once it says yes, the batch is given up.

    Raises:
        EngineError: the batch was given up.
    """
    prompts = list(dict.fromkeys(call.prompt for call in calls))
    row_of = {prompt: row for row, prompt in enumerate(prompts)}
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left: the next token is last in every row
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    cache = DynamicCache(config=model.config)
    logits = _forward(model, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
    expand = torch.tensor([row_of[call.prompt] for call in calls], device=model.device)
    cache.batch_select_indices(expand)
    logits, mask = logits[expand], mask[expand]

    draws = [np.random.default_rng(call.seed).random(call.max_tokens) for call in calls]
    temperatures = torch.tensor([call.temperature for call in calls], device=model.device)
    replies = [Reply() for _ in calls]
    live = list(range(len(calls)))  # live[i] is the call that row i of the cache belongs to
    while True:
        if overdue():
            raise EngineError("the batch was given up: it ran for longer than timeout_s")
        step = [min(len(replies[call].ids), len(draws[call]) - 1) for call in live]
        uniform = torch.tensor([draws[call][n] for call, n in zip(live, step, strict=True)], dtype=torch.float64)
        tokens, logprobs = sample(logits, temperatures[live], uniform.to(model.device))
        for call, token, logprob in zip(live, tokens.tolist(), logprobs.tolist(), strict=True):
            _append(replies[call], token, logprob, eos, calls[call].max_tokens)
        rows = [row for row, call in enumerate(live) if not replies[call].finish_reason]
        if not rows:
            return replies
        if 2 * len(rows) <= len(live):
            kept = torch.tensor(rows, device=model.device)
            cache.batch_select_indices(kept)
            mask, tokens, live = mask[kept], tokens[kept], [live[row] for row in rows]
        position = mask.sum(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        logits = _forward(model, tokens[:, None], mask, position, cache)


def _append(reply: Reply, token: int, logprob: float, eos: frozenset[int], max_tokens: int) -> None:
    if reply.finish_reason:
        return  # it ended, and waits in the batch for the others
    reply.ids.append(token)
    reply.logprobs.append(logprob)
    if token in eos:
        reply.finish_reason = "stop"
    elif len(reply.ids) == max_tokens:
        reply.finish_reason = "length"


def _forward(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, position_ids: torch.Tensor, cache: DynamicCache
) -> torch.Tensor:
    """Next-token logits (rows, vocabulary) in float32."""
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: torch.Tensor = output.logits[:, -1].float()
    return logits


def sample(
    logits: torch.Tensor, temperatures: torch.Tensor, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row by inverting the distribution function at ``uniform``; 0 temperature is the argmax.

    Args:
        logits: (rows, vocabulary), float32.
        temperatures: (rows,).
        uniform: (rows,) float64 in [0, 1).

    Returns:
        Token ids and their log-probabilities under the distribution drawn from, both (rows,).
    """
    greedy = temperatures == 0
    logprobs = (logits / torch.where(greedy, 1.0, temperatures)[:, None]).log_softmax(-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    # Scaled by the total: rounding may leave it just under 1, and a draw beyond it would have no token.
    tokens = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    tokens = torch.where(greedy, logits.argmax(-1), tokens.clamp(max=logits.shape[-1] - 1))
    chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
    return tokens, torch.where(greedy, 0.0, chosen)
