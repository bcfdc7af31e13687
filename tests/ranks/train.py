"""Run by every rank: rank 0 trains each case with the others, and writes what came out.

train.py MODELS OUT
"""

import os
import sys
from pathlib import Path

import torch

from dspy_fst.errors import NotFiniteError
from dspy_fst.slow.ranks.joining import all_ranks
from dspy_fst.slow.ranks.ranks import Ranks, on_all_ranks
from dspy_fst.slow.trainer import Trainer
from tests.ranks.lessons import (
    CASES,
    STATES,
    STEPS,
    TEXTS,
    TRAINED,
    WAYS,
    Case,
    a_batch,
    saved,
    trained,
    weights_of,
    whole_weights,
)

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
        for name, way in TRAINED:
            learn(name, CASES[name].with_settings(**WAYS[way]), models, out / way, ranks)
        halving = Case("untied").with_settings(adam_epsilon=1e-7).trainer(models, ranks)
        saved(out / f"{FULL}.pt", (halving.step(a_batch(0)), weights_of(halving)))
        saved(out / "not finite.pt", refused(Case("untied").trainer(models, ranks)))
        small = Case("untied").trainer(models, ranks)
        saved(out / "one row.pt", (small.step(a_batch(1, rows=1)), weights_of(small)))


def learn(name: str, case: Case, models: Path, out: Path, ranks: Ranks) -> None:
    """Train a case, from the model and from the state of one process."""
    trainer = case.trainer(models, ranks)
    reports = trained(trainer)
    saved(out / f"{name}.pt", (trainer.whole_weights(), reports))
    if name not in STATES:
        return
    version = trainer.publish(out / name / "step", "step-000005")
    saved(out / f"{name} shown.pt", (version, trainer.score(TEXTS), trainer.held()))
    trainer.save_state(out / f"{name} state")
    trainer = case.trainer(models, ranks)
    trainer.load_state(models / f"{name} state")  # that one process saved
    trained(trainer, STEPS, 2)
    saved(out / f"{name} resumed.pt", trainer.whole_weights())


@on_all_ranks
def held(trainer: Trainer) -> list[int]:
    """Numbers of weights and moments in the memory of each rank."""
    moments = [value for of in trainer._optimizer.state.values() for name, value in of.items() if name != "step"]
    kept = [*trainer.policy.parameters(), *trainer._start.policy.parameters(), *moments]
    shares = {id(one): getattr(one, "_local_tensor", one).numel() for one in kept}
    return trainer.ranks.gathered(sum(shares.values()))


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
    Trainer.held, Trainer.whole_weights = held, whole_weights
    main(Path(sys.argv[1]), Path(sys.argv[2]))
