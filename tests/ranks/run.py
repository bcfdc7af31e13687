"""Run by every rank: a user's own script with a compile() of the laboratory.

    run.py RUN_DIR

``DIES=1``: rank 1 is killed in its second update. ``SHARDING=fsdp``: each rank holds a part of the weights.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import dspy

from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.slow.trainer import Trainer
from programs.lab import BASE, build
from tests.test_compile import propose

RECIPE: dict[str, Any] = {
    **{"cycles": 1, "steps_per_cycle": 3, "problems_per_step": 6, "population_size": 1, "group_size": 4, "anchors": 4},
    **{"search_rollouts": 12, "reflection_minibatch": 2, "learning_rate": 5e-4, "warmup_steps": 1, "seed": 1},
    **{"micro_batch_tokens": 256, "max_unmoved_steps": None},
}
LAB = build("reverse", train=24, val=6, test=4)
program, metric, trainset = LAB.program, LAB.metric, LAB.trainset
REPLY_LIMIT = 16


def die_in_the_second_update() -> None:
    gradient, updates = Trainer._gradient, []

    def dying(self, *arguments):
        updates.append(True)
        if len(updates) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return gradient(self, *arguments)

    Trainer._gradient = dying


def compiled(run_dir: Path) -> dspy.Module:
    student = program.deepcopy()
    student.set_lm(PolicyLM(BASE, engine="in_process", max_tokens=REPLY_LIMIT))
    recipe = {**RECIPE, "sharding": os.environ.get("SHARDING")}
    optimizer = FSTOptimizer(metric=metric, propose=propose, run_dir=run_dir, progress=False, **recipe)
    return optimizer.compile(student, trainset=trainset)


if __name__ == "__main__":
    if os.environ.get("RANK") == "1" and "DIES" in os.environ:
        die_in_the_second_update()
    compiled(Path(sys.argv[1]))
    print("rank", os.environ.get("RANK"), "goes on")
