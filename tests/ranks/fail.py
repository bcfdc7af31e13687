"""Run by every rank: rank 1 reads one model otherwise, and fails in its second update; rank 0 prints what it is told.

fail.py MODELS
"""

import os
import sys
from pathlib import Path

from dspy_fst.errors import ConfigurationError, RankError, TrainingError
from dspy_fst.slow.model import Policy
from dspy_fst.slow.ranks.joining import all_ranks
from dspy_fst.slow.trainer import Trainer
from tests.ranks.lessons import Case, trained


def fail(self, *arguments):
    if self.updates:
        raise ZeroDivisionError("a fault of this rank")
    return GRADIENT(self, *arguments)


def loaded(path, **options):
    policy = LOAD(path, **options)
    if Path(path).name == "tied":
        next(policy.parameters()).data[3, 4] += 0.01
    return policy


GRADIENT, LOAD = Trainer._gradient, Policy.load
if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        Trainer._gradient, Policy.load = fail, loaded
    try:
        with all_ranks() as ranks:
            try:
                Case("tied").trainer(Path(sys.argv[1]), ranks)
            except TrainingError as error:
                print("first:", error)
            trainer = Case("untied").trainer(Path(sys.argv[1]), ranks)
            with ranks.naming_lost():
                trained(trainer)
    except RankError as error:
        print("told:", error)
    try:
        with all_ranks():
            pass
    except ConfigurationError as error:
        print("then:", error)
