"""The sides of an update's measurement, each in a process of its own: ours, another commit's, and trl's.

A benchmark starts itself again by `in_checkout.measured_by` for one side. There the `dspy_fst` of the side's checkout
is imported, while `benchmarks` stays this one.
"""

import gc
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from dspy_fst.slow.trainer import Trainer
from dspy_fst.types import Batch, Row

ROOT = Path(__file__).parent.parent
KL, BUDGET = 0.001, 4096


class Side(NamedTuple):
    """Who makes an update."""

    update: Callable[[Sequence[Row]], Any]
    """One update on some rows; ours returns its report, trl's the gradient's norm."""
    loaded: int
    """Resident bytes once the weights were read."""


def random_ids(count: int, length: int, vocabulary: int, draws: Any) -> list[list[int]]:
    """Texts of random tokens: neither memory nor time depends on what they say."""
    import torch

    ids: list[list[int]] = torch.randint(5, vocabulary, (count, length), generator=draws).tolist()
    return ids


def rows_of(prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]) -> list[Row]:
    """Rows whose advantages are 1 and -1 in turns, and whose replies were unlikely, so that no ratio is clipped."""
    weight = 1 / sum(map(len, replies))
    return [
        Row(tuple(prompt), tuple(reply), (-10.0,) * len(reply), (-1.0) ** index, weight, 1.0, "answer", index)
        for index, (prompt, reply) in enumerate(zip(prompts, replies, strict=True))
    ]


def ours(folder: Path, **changes: Any) -> Side:
    """An update by the `dspy_fst` on the path, which may be another commit's."""
    try:
        settings = importlib.import_module("dspy_fst.slow.training_settings").TrainingSettings
    except ImportError:  # an older commit's
        settings = importlib.import_module("dspy_fst.slow.settings").TrainerSettings
    given = {"learning_rate": 1e-9, "kl_coefficient": KL, "micro_batch_tokens": BUDGET, "min_effective_share": 0.0}
    trainer = Trainer(folder, settings(**given, **changes), device="cpu")
    gc.collect()
    return Side(lambda rows: trainer.step(Batch(tuple(rows), "step-000000")), psutil.Process().memory_info().rss)


def trl(folder: Path, at_once: int) -> Side:
    """An update by trl in float32, ``at_once`` rows in a pass."""
    from benchmarks.trl_side import TrlSide

    side = TrlSide(folder, KL, at_once)
    return Side(lambda rows: side.update(side.inputs(rows, at_once)), side.loaded)
