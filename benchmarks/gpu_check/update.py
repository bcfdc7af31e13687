"""One weight update beside ``trl.GRPOTrainer``'s on the same rows: speed, MFU, peak memory; full weights and LoRA.

    python -m benchmarks.gpu_check.update 0.5B

The rows have a DSPy program's shape: PROBLEMS problems with GROUP rollouts each, over CANDIDATES instructions, so that
every prompt is shared by GROUP / CANDIDATES rollouts. Their log-probabilities are the trainer's own, as if it had
sampled them.
Both sides make the CISPO loss, the KL term, the gradient and AdamW's step, in bfloat16 over float32 weights.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.child import attempt, free, row, wait_for_turn
from benchmarks.gpu_check.models import config_of, parameters_of, random_model
from benchmarks.trl_side import TrlSide
from dspy_fst.recipe.lora_settings import LoRA
from dspy_fst.slow.batching import Scored, micro_batches
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.types import Batch, Call, Row

PROBLEMS, GROUP, CANDIDATES = 8, 8, 4
PROMPT, REPLY = 250, 256
"""Tokens."""
RANK, ALPHA = 16, 32.0
REPEATS, LEAST_BUDGET = 3, 512
PEAK_FLOPS = {"H100 80GB HBM3": 989.4e12, "H200": 989.4e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s by a part of the card's name: half of what NVIDIA's data sheets of the H100 SXM and H200 give
"with sparsity" (1,979 TFLOPS); the A100's is given without."""
FULL_FLOPS, LORA_FLOPS = 6, 4
"""FLOPs for each token and parameter. Forward takes 2, the backward pass through the layers 2, and the gradient of the
weights 2 more, which a frozen base under a LoRA does not have (PaLM, arXiv 2204.02311, App. B). Attention, the KL
term's forward pass of the start and the LoRA's own numbers are left out, on both sides."""
FULL_BYTES = 16
"""A parameter in training: float32 weight, gradient and two moments."""
START_BYTES = 4
"""A parameter of the frozen start (KL), at most."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    shape: str
    adapter: bool
    """Whether a LoRA is trained, or all weights."""
    kl: float
    budget: int
    """Micro-batch tokens to begin with; halved while memory runs out."""

    @property
    def weights(self) -> str:
        return f"LoRA rank {RANK}" if self.adapter else "full"

    @property
    def flops_per_token(self) -> float:
        """Of one update."""
        return float((LORA_FLOPS if self.adapter else FULL_FLOPS) * parameters_of(self.shape))


BUDGETS = {"tiny": (2048, 2048), "0.5B": (8192, 8192), "1.7B": (8192, 8192), "4B": (2048, 4096), "8B": (2048, 2048)}
"""For full weights and for LoRA."""
FULL = ("tiny", "0.5B", "1.7B", "4B")
LORA = ("tiny", "0.5B", "4B", "8B")


def cases(shape: str, card_bytes: float) -> list[Case]:
    """The rows of a shape. Full weights that fit without the KL's frozen start alone are trained without it."""
    full, lora = BUDGETS[shape]
    count, found = parameters_of(shape), []
    if shape in FULL:
        fits = (FULL_BYTES + START_BYTES) * count < 0.9 * card_bytes
        found.append(Case(shape, adapter=False, kl=0.001 if fits else 0.0, budget=full))
    return [*found, Case(shape, adapter=True, kl=0.001, budget=lora)] if shape in LORA else found


def texts(vocabulary: int, prompt: int, reply: int) -> list[Call]:
    """Random calls of the shape above; their log-probabilities are those of a uniform choice."""
    draws = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, vocabulary, (length,), generator=draws).tolist())

    prompts = [ids(prompt) for _ in range(PROBLEMS * CANDIDATES)]
    uniform = (-math.log(vocabulary),) * reply
    return [
        Call("answer", shared, ids(reply), uniform, "length", "start")
        for shared in prompts
        for _ in range(GROUP // CANDIDATES)
    ]


def batch_of(calls: Sequence[Call]) -> Batch:
    """The calls as rows, with advantages of +1 and -1 in turns."""
    weight = 1 / sum(len(call.completion_ids) for call in calls)
    rows = [
        Row(call.prompt_ids, call.completion_ids, call.logprobs, advantage=1.0 - 2 * (index % 2), token_weight=weight)
        for index, call in enumerate(calls)
    ]
    return Batch(tuple(rows), "start")


def our_settings(case: Case, budget: int) -> TrainingSettings:
    """The trainer's settings of a case."""
    return TrainingSettings(
        learning_rate=1e-6,
        kl_coefficient=case.kl,
        min_effective_share=0.5,
        micro_batch_tokens=budget,
        precision="bfloat16",
        adapter=LoRA(rank=RANK, alpha=ALPHA) if case.adapter else None,
    )


def our_step(case: Case, budget: int, folder: Path, calls: Sequence[Call]) -> Callable[[], Any]:
    """A step of this package's trainer, on the calls with its own log-probabilities."""
    trainer = Trainer(
        folder,
        our_settings(case, budget),
        device="auto" if torch.cuda.is_available() else "cpu",
    )
    recorded = zip(calls, trainer.logprobs(calls), strict=True)
    batch = batch_of([replace(call, logprobs=tuple(logprobs)) for call, logprobs in recorded])
    return lambda: trainer.step(batch)


def tokens_of(batch: Batch, budget: int) -> tuple[int, int]:
    """Tokens that our trainer reads, padding included, each shared prompt once; and tokens in the rows."""
    scored = [Scored((*row.prompt_ids, *row.completion_ids), len(row.prompt_ids)) for row in batch.rows]
    read = sum(micro.tokens_read for micro in micro_batches(scored, budget, share=True))
    return read, sum(len(sequence.ids) for sequence in scored)


@dataclass(frozen=True)
class Measured:
    """What one side took."""

    seconds: list[float]
    peak_bytes: int
    loaded_bytes: int
    budget: int


def measure(make: Callable[[int], Callable[[], Any]], budget: int, least: int = LEAST_BUDGET) -> Measured:
    """Time steps at the largest budget, halved from the given one, at which memory suffices.

    Raises:
        torch.OutOfMemoryError: it does not at the least budget either.
    """
    while True:
        try:
            return _measure_at(make, budget)
        except torch.OutOfMemoryError:
            if budget // 2 < least:
                raise
        budget //= 2  # outside the handler, whose error holds the frames, and with them the memory
        free()


def _measure_at(make: Callable[[int], Callable[[], Any]], budget: int) -> Measured:
    on_gpu = torch.cuda.is_available()
    step = make(budget)
    step()  # warm: moments, the frozen start, kernels
    loaded = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return Measured(seconds, torch.cuda.max_memory_allocated() if on_gpu else 0, loaded, budget)


def mfu(case: Case, tokens: int, seconds: float, card: str) -> float | None:
    """FLOPs of the tokens / (seconds * peak FLOP/s of the card); None for a card that PEAK_FLOPS lacks."""
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)
    return None if peak is None else case.flops_per_token * tokens / (seconds * peak)


def report(case: Case, side: str, measured: Measured, batch: Batch, card: str) -> None:
    """One row: a side of a case."""
    read, in_rows = tokens_of(batch, measured.budget)
    read = read if side == "dspy_fst" else in_rows
    seconds = statistics.median(measured.seconds)
    row(
        model=case.shape,
        weights=case.weights,
        kl=case.kl,
        trainer=side,
        micro_batch_tokens=measured.budget,
        seconds=seconds,
        all_seconds=measured.seconds,
        tokens_per_s=in_rows / seconds,
        mfu_rows=mfu(case, in_rows, seconds, card),
        mfu_read=mfu(case, read, seconds, card),
        peak_gib=measured.peak_bytes / 2**30,
        above_loaded_gib=(measured.peak_bytes - measured.loaded_bytes) / 2**30,
        flops_per_token=case.flops_per_token,
        parameters=parameters_of(case.shape),
    )


def trl_step(case: Case, budget: int, folder: Path, batch: Batch) -> Callable[[], Any]:
    """One update of trl on the batch's rows, which have one length, so that padding takes nothing."""
    lora = (RANK, int(ALPHA)) if case.adapter else None
    side = TrlSide(folder, case.kl, len(batch.rows), lora=lora, bf16=True)
    length = len(batch.rows[0].prompt_ids) + len(batch.rows[0].completion_ids)
    parts = side.inputs(batch.rows, max(1, budget // length))
    return lambda: side.update(parts)


SIDES = ("dspy_fst", "trl")


def run(shape: str, folder: Path, card: str, card_bytes: float, sides: Sequence[str] = SIDES) -> None:
    """Every case of a shape, ours and trl's in turns."""
    lengths = (PROMPT, REPLY) if torch.cuda.is_available() else (12, 12)
    calls = texts(config_of(shape).vocab_size, *lengths)
    batch = batch_of(calls)
    for case in cases(shape, card_bytes):

        def ours(budget: int, case: Case = case) -> Callable[[], Any]:
            return our_step(case, budget, folder, calls)

        def theirs(budget: int, case: Case = case) -> Callable[[], Any]:
            return trl_step(case, budget, folder, batch)

        for side, make in zip(SIDES, (ours, theirs), strict=True):
            if side not in sides:
                continue
            names = {"model": shape, "weights": case.weights, "trainer": side}

            def one(case: Case = case, side: str = side, make: Callable[..., Any] = make) -> None:
                measured = measure(make, case.budget)
                report(case, side, measured, batch, card)

            attempt(one, **names)
            free()


def main(arguments: Sequence[str]) -> None:
    (shape,) = arguments
    on_gpu = torch.cuda.is_available()
    card = torch.cuda.get_device_name() if on_gpu else "CPU"
    with random_model(shape) as folder:
        wait_for_turn()
        card_bytes = float(torch.cuda.mem_get_info()[1]) if on_gpu else 2.0**30
        run(shape, folder, card, card_bytes)


if __name__ == "__main__":
    main(sys.argv[1:])
