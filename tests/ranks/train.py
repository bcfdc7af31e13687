"""Run by every rank: rank 0 trains each case with the others, and writes what came out.

train.py MODELS OUT
"""

import os
import sys
from pathlib import Path

import torch

from dspy_fst.errors import NotFiniteError
from dspy_fst.slow.ranks.joining import all_ranks
from dspy_fst.slow.trainer import Trainer
from tests.ranks.lessons import CASES, STEPS, Case, a_batch, saved, trained, weights_of

FULL = "full memory"
"""A case in which memory runs out once, on rank 1 alone."""


def run_out_of_memory_once() -> None:
    learn, failed = Trainer._learn, []

    def learning(self, *arguments):
        if self.settings.adam_epsilon == 1e-7 and not failed:  # marks the case
            failed.append(True)
            raise torch.OutOfMemoryError
        learn(self, *arguments)

    Trainer._learn = learning


def main(models: Path, out: Path) -> None:
    if os.environ["RANK"] == "1":
        run_out_of_memory_once()
    with all_ranks() as ranks:
        for name, case in CASES.items():
            trainer = case.trainer(models, ranks)
            reports = trained(trainer)
            saved(out / f"{name}.pt", (weights_of(trainer), reports))
            if name in ("full", "lora"):
                trainer.save_state(out / f"{name} state")
                trainer = case.trainer(models, ranks)
                trainer.load_state(models / f"{name} state")  # that one process saved
                trained(trainer, STEPS, 2)
                saved(out / f"{name} resumed.pt", weights_of(trainer))
        halving = Case("untied").with_settings(adam_epsilon=1e-7).trainer(models, ranks)
        saved(out / f"{FULL}.pt", (halving.step(a_batch(0)), weights_of(halving)))
        saved(out / "not finite.pt", refused(Case("untied").trainer(models, ranks)))
        small = Case("untied").trainer(models, ranks)
        saved(out / "one row.pt", (small.step(a_batch(1, rows=1)), weights_of(small)))


def refused(trainer: Trainer) -> tuple[str, object]:
    """What a batch with an infinite advantage gives, and the update after it."""
    batch = a_batch(0)
    object.__setattr__(batch.rows[0], "advantage", float("inf"))
    try:
        trainer.step(batch)
    except NotFiniteError as error:
        return str(error), weights_of(trainer), trained(trainer)
    raise AssertionError("it was learnt from")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
