"""An update that runs out of memory is made again with smaller micro-batches, and is the same."""

import dataclasses

import pytest
import torch

from dspy_fst.errors import TrainingError
from dspy_fst.slow.batching import MicroBatch
from dspy_fst.slow.micro_batch_budget import UNPLANNED_TOKENS, MicroBatchBudget, longest_sequence
from dspy_fst.slow.model import Policy
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.types import SeedKLCall
from tests.slow.makers import make_batch, make_call, make_row, save_model

BUDGET, LONGEST = 64, 12
"""The model reads 11 tokens of each row: 55 in a micro-batch of 64, 22 in one of 32, 11 in one of 16."""
BATCH = make_batch([make_row([1, 2, n], [5 + n] * 9, [-3.0] * 9, (-1.0) ** n, 1 / 90) for n in range(10)])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("start"))


def a_trainer(start, budget=BUDGET) -> Trainer:
    settings = TrainingSettings(
        learning_rate=1e-2, kl_coefficient=0.1, micro_batch_tokens=budget, min_effective_share=0.0
    )
    return Trainer(start, settings, device="cpu")


@pytest.fixture
def memory(monkeypatch):
    """A function that makes forward passes run out of memory where its argument, given a micro-batch, says so."""
    forward = Policy.readout

    def holds(too_much):
        def readout(self, micro):
            if too_much(micro):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
            return forward(self, micro)

        monkeypatch.setattr(Policy, "readout", readout)

    return holds


def unequal(one: Trainer, other: Trainer) -> list[str]:
    return [name for name, p in one.parameters.items() if not torch.equal(p, other.parameters[name])]


def reads_more_than(tokens):
    def too_much(micro: MicroBatch) -> bool:
        return micro.tokens_read > tokens

    return too_much


@pytest.mark.parametrize(("room", "found"), [(54, 32), (21, 16)], ids=str)
def test_an_update_is_made_again_with_micro_batches_that_fit(start, memory, room, found):
    expected = a_trainer(start, found)
    report = expected.step(BATCH)
    trainer = a_trainer(start)
    memory(reads_more_than(room))
    told = trainer.step(BATCH)
    assert told.halved_to == found
    assert dataclasses.replace(told, halved_to=None) == report  # measured anew: nothing is counted twice
    assert report.halved_to is None
    assert unequal(trainer, expected) == []
    assert trainer.updates == 1
    assert trainer.step(BATCH).halved_to is None  # the smaller size stays


def test_the_gradients_of_the_first_try_are_dropped(start, memory):
    expected = a_trainer(start, BUDGET // 2)
    report = expected.step(BATCH)
    trainer, passes = a_trainer(start), iter(range(1000))
    memory(lambda _: next(passes) == 2)  # the start's and the policy's first micro-batch have been learnt from
    assert dataclasses.replace(trainer.step(BATCH), halved_to=None) == report
    assert unequal(trainer, expected) == []


def test_no_memory_for_the_longest_sequence_stops_with_what_to_do(start, memory):
    trainer, untouched = a_trainer(start), a_trainer(start)
    memory(lambda _: True)
    with pytest.raises(TrainingError, match=rf"update 1 ran out of memory .* of {LONGEST} tokens, .*Lower max_tokens"):
        trainer.step(BATCH)
    assert unequal(trainer, untouched) == []
    assert [name for name, p in trainer.parameters.items() if p.grad is not None] == []


def test_a_continued_trainer_keeps_the_smaller_size(start, memory, tmp_path):
    trainer = a_trainer(start)
    trainer.save_state(tmp_path / "before")
    memory(reads_more_than(40))
    trainer.step(BATCH)
    trainer.save_state(tmp_path / "after")
    memory(lambda _: False)
    continued = a_trainer(start)
    continued.load_state(tmp_path / "after")
    assert trainer.step(BATCH) == continued.step(BATCH)
    assert unequal(trainer, continued) == []
    assert continued._budget.tokens == BUDGET // 2
    continued.load_state(tmp_path / "before")
    assert continued._budget.tokens == BUDGET
    smaller = a_trainer(start, 16)
    smaller.load_state(tmp_path / "after")
    assert smaller._budget.tokens == 16


def test_the_longest_sequence_counts_the_seed_s_prompts():
    held = SeedKLCall(make_call([5] * 4, [1, 2]), (1,) * 20)
    assert longest_sequence(dataclasses.replace(BATCH, seed_kl_calls=(held,))) == 24
    assert longest_sequence(BATCH) == LONGEST


def test_auto_without_a_plan_has_a_size():
    assert MicroBatchBudget("auto").tokens == UNPLANNED_TOKENS
