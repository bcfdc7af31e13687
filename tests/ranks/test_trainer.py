"""Two gloo ranks train what one process trains."""

from pathlib import Path

import pytest
import torch

from tests.ranks.launching import by_torchrun
from tests.ranks.lessons import CASES, STEPS, Case, a_batch, fresh, furthest, trained, weights_of
from tests.slow.conftest import one_thread  # noqa: F401
from tests.slow.makers import save_model

pytestmark = pytest.mark.slow
SAME = 1e-6


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "untied")
    save_model(folder / "tied", tied=True)
    return folder


@pytest.fixture(scope="module")
def alone(models):
    """Case -> weights and reports of one process, whose states lie beside the models."""
    torch.set_num_threads(1)
    found = {}
    for name, case in CASES.items():
        trainer = case.trainer(models)
        reports = trained(trainer)
        found[name] = weights_of(trainer), reports
        if name in ("full", "lora"):
            trainer.save_state(models / f"{name} state")
    return found


@pytest.fixture(scope="module")
def several(models, alone, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("several")
    done = by_torchrun(Path(__file__).with_name("train.py"), models, out)
    assert done.returncode == 0, done.stdout[-4000:]
    return out


def read(path):
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("name", CASES)
def test_the_weights_after_five_steps_are_those_of_one_process(several, alone, models, name):
    found, _ = read(several / f"{name}.pt")
    assert furthest(found, alone[name][0]) < SAME
    assert CASES[name].settings.adapter or furthest(found, fresh(models / CASES[name].model)) > 1e-4


@pytest.mark.parametrize("name", CASES)
def test_an_update_reports_what_all_ranks_measured(several, alone, name):
    for found, wanted in zip(read(several / f"{name}.pt")[1], alone[name][1], strict=True):
        assert found.adapters.keys() == wanted.adapters.keys()
        for own, its in [(wanted, found), *((report, found.adapters[a]) for a, report in wanted.adapters.items())]:
            for field, value in vars(own).items():
                if isinstance(value, float | int):
                    assert getattr(its, field) == pytest.approx(value, rel=1e-4, abs=1e-6), field


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_state_of_two_ranks_goes_on_in_one_process_and_back(several, alone, models, name):
    wanted = CASES[name].trainer(models)
    wanted.load_state(models / f"{name} state")
    trained(wanted, STEPS, 2)
    moved = CASES[name].trainer(models)
    moved.load_state(several / f"{name} state")
    trained(moved, STEPS, 2)
    assert furthest(weights_of(moved), weights_of(wanted)) < SAME
    assert furthest(read(several / f"{name} resumed.pt"), weights_of(wanted)) < SAME


def test_memory_that_runs_out_on_one_rank_halves_the_micro_batches_of_all(several, models):
    report, weights = read(several / "full memory.pt")
    trainer = Case("untied").with_settings(adam_epsilon=1e-7, micro_batch_tokens=report.halved_to).trainer(models)
    wanted = trainer.step(a_batch(0))
    assert report.halved_to < 24
    assert report.tokens == wanted.tokens
    assert furthest(weights, weights_of(trainer)) < SAME


def test_a_loss_that_is_not_finite_on_one_rank_is_refused_by_all_and_training_goes_on(several, alone, models):
    words, weights, after = read(several / "not finite.pt")
    assert "update 1: loss" in words
    assert furthest(weights, fresh(models / "untied")) == 0
    assert [report.tokens for report in after] == [report.tokens for report in alone["full"][1]]


def test_a_batch_with_fewer_micro_batches_than_ranks_is_learnt(several, models):
    _, weights = read(several / "one row.pt")
    trainer = Case("untied").trainer(models)
    trainer.step(a_batch(1, rows=1))
    assert furthest(weights, weights_of(trainer)) < SAME
