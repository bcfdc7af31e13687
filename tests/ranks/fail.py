"""Run by every rank: rank 1 reads a model, a reference and a state otherwise, and fails in its second update; rank 0
prints what it is told.

    fail.py MODELS

``GONE=1``: rank 1 cannot read a model at all.
"""

import os
import sys
from pathlib import Path

from dspy_fst.errors import ConfigurationError, RankError, TrainingError
from dspy_fst.slow import trainer_files
from dspy_fst.slow.model import Policy
from dspy_fst.slow.ranks.joining import all_ranks
from dspy_fst.slow.ranks.roles import make_trainer
from dspy_fst.slow.trainer import Trainer
from tests.ranks.lessons import SETTINGS, Case, trained
from tests.slow.makers import save_model


def fail(self, *arguments):
    if self.updates:
        raise ZeroDivisionError("a fault of this rank")
    return GRADIENT(self, *arguments)


def loaded(path, **options):
    if "GONE" in os.environ:
        raise TrainingError("no such folder")
    policy = LOAD(path, **options)
    if Path(path).name == "tied":
        next(policy.parameters()).data[3, 4] += 0.01
    return policy


def read_otherwise(path, shares):
    tensors, facts = READ(path, shares)
    next(own for name, own in tensors.items() if name.startswith("weights/"))[0] += 0.01
    return tensors, facts


GRADIENT, LOAD, READ = Trainer._gradient, Policy.load, trainer_files.read_state
if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        Trainer._gradient, Policy.load, trainer_files.read_state = fail, loaded, read_otherwise
    own = Path(sys.argv[1], os.environ["RANK"])  # as a disk of the rank's own
    save_model(own / "start", seed=int(os.environ["RANK"]))
    os.chdir(own)
    try:
        with all_ranks() as ranks:
            try:
                Case("tied").trainer(Path(sys.argv[1]), ranks)
            except RankError:
                raise
            except TrainingError as error:
                print("first:", error)
            try:
                make_trainer(ranks, Path(sys.argv[1]) / "untied", SETTINGS, device="cpu", reference=Path("start"))
            except TrainingError as error:
                print("reference:", error)
            trainer = Case("untied").trainer(Path(sys.argv[1]), ranks)
            trainer.save_state(Path(sys.argv[1]) / "state")
            try:
                trainer.load_state(Path(sys.argv[1]) / "state")
            except TrainingError as error:
                print("state:", error)
            with ranks.naming_lost():
                trained(trainer)
    except RankError as error:
        print("told:", error)
    try:
        with all_ranks():
            pass
    except ConfigurationError as error:
        print("then:", error)
