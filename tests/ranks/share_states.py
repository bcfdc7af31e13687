"""Run by every rank, which share the weights: rank 0 reads and writes states with the others.

share_states.py FROM OUT MODELS

Every case reads its state in FROM and writes it again. With two ranks it is then trained, from there and from the
state that was written meanwhile, and one case meets what can go wrong. ``DIES=first``: there is one case, and rank 1
is killed before it begins its first state; ``second``: while it writes its second one. Rank 0 prints what it is told.
"""

import json
import os
import resource
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from dspy_fst.errors import RankError, TrainingError
from dspy_fst.slow.ranks import parts, writing
from dspy_fst.slow.ranks import ranks as ranks_of_a_trainer
from dspy_fst.slow.ranks.joining import all_ranks
from dspy_fst.slow.ranks.ranks import Ranks, on_all_ranks
from dspy_fst.slow.trainer import Trainer
from tests.ranks.lessons import SHARDED, SHAREABLE, STEPS, TEXTS, Case, saved, trained, whole_weights

FULL_TENSOR = DTensor.full_tensor


def put_together(tensor: DTensor) -> None:
    raise AssertionError("a tensor is put together")


@on_all_ranks
def allow_whole(trainer: Trainer, allowed: bool) -> None:
    DTensor.full_tensor = FULL_TENSOR if allowed else put_together


@on_all_ranks
def draw(trainer: Trainer) -> None:
    """Rank 1's generator goes its own way; a state has rank 0's."""
    if os.environ["RANK"] == "1":
        torch.rand(1)


@on_all_ranks
def limit_files(trainer: Trainer, most: int) -> None:
    """Rank 1 may not write larger files, as if its disk were full."""
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))


@on_all_ranks
def use_another_disk(trainer: Trainer, folder: Path) -> None:
    """Rank 1 finds nothing of what rank 0 has just written."""
    look = ranks_of_a_trainer._unwritable
    if os.environ["RANK"] == "1":
        ranks_of_a_trainer._unwritable = lambda probe, *rest: look(folder / probe.name, *rest)


@on_all_ranks
def die_writing(trainer: Trainer) -> None:
    if os.environ["RANK"] == "1":
        parts._Writer.write_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


@on_all_ranks
def die_beginning(trainer: Trainer) -> None:
    if os.environ["RANK"] == "1":
        writing.PartsWriter.__init__ = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def lose_a_rank(case: Case, out: Path, models: Path) -> None:
    with all_ranks() as ranks, ThreadPoolExecutor(1) as pool:
        trainer = case.with_settings(**SHARDED).trainer(models, ranks)
        if os.environ["DIES"] == "first":
            trainer.die_beginning()
        else:
            trainer.save_state(out / "before")
            trainer.die_writing()
        try:
            pool.submit(trainer.state_writer(), out / "lost").result()
        except RankError as error:
            print("told:", error)


def main(states: Path, out: Path, models: Path) -> None:
    out.mkdir(exist_ok=True)  # by every rank
    with all_ranks() as ranks:
        for name, case in SHAREABLE.items():
            case = case.with_settings(**SHARDED)
            trainer = case.trainer(models, ranks)
            trainer.load_state(states / f"{name} state")
            trainer.draw()
            trainer.allow_whole(False)
            trainer.save_state(out / f"{name} state")
            trainer.allow_whole(True)
            if ranks.world == 2:
                go_on(name, case, trainer, out, models)
        if ranks.world == 2:
            (out / "told.json").write_text(json.dumps(told(trainer, ranks, out)))


def go_on(name: str, case: Case, trainer: Trainer, out: Path, models: Path) -> None:
    """Train on; and again from the state."""
    trained(trainer, STEPS, 2)
    write = trainer.state_writer()
    thread = threading.Thread(target=write, args=(out / f"{name} later",))
    thread.start()
    trainer.score(TEXTS)  # as a publish's proof, or whatever is sampled meanwhile
    thread.join()
    trained(trainer, STEPS + 2, 2)
    again = case.trainer(models, trainer.ranks)
    again.load_state(out / f"{name} later")
    trained(again, STEPS + 2, 2)
    saved(out / f"{name}.pt", (trainer.whole_weights(), again.whole_weights()))


def told(trainer: Trainer, ranks: Ranks, out: Path) -> dict[str, str]:
    """What is said of a disk that is full, and of a folder that is not seen; and that all goes on."""
    found: dict[str, str] = {}
    trainer.check_folder(out)
    trainer.limit_files(1000)
    try:
        trainer.save_state(out / "too large")
    except OSError as error:
        found["full"] = f"{type(error).__name__}: {error}"
    trainer.limit_files(resource.RLIM_INFINITY)
    trainer.state_writer()  # and is never called, as where the state before has failed
    trainer.save_state(out / "after it")
    (out / "elsewhere").mkdir()
    trainer.use_another_disk(out / "elsewhere")
    try:
        trainer.check_folder(out)
    except TrainingError as error:
        found["unseen"] = str(error)
    with suppress(TrainingError):
        trainer.load_state(out / "none")
    return found


if __name__ == "__main__":
    for method in (allow_whole, draw, limit_files, die_beginning, die_writing, use_another_disk, whole_weights):
        setattr(Trainer, method.__name__, method)
    if "DIES" in os.environ:
        lose_a_rank(SHAREABLE["full"], *map(Path, sys.argv[2:]))
    else:
        main(*map(Path, sys.argv[1:]))
