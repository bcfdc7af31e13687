"""Two gloo ranks train what one process trains."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dspy_fst.errors import RankError
from dspy_fst.slow.batching import Scored, in_rounds, micro_batches
from dspy_fst.slow.training_settings import TrainingSettings
from tests.ranks.launching import by_torchrun
from tests.ranks.lessons import (
    CASES,
    STATES,
    STEPS,
    TEXTS,
    TRAINED,
    WAYS,
    Case,
    a_batch,
    fresh,
    furthest,
    trained,
    weights_of,
)
from tests.slow.conftest import one_thread  # noqa: F401
from tests.slow.makers import save_model

pytestmark = pytest.mark.slow
SAME = 1e-6
FAR = {"": SAME, "sharded": 1e-5}
"""How the ranks share the weights -> how far they may be from one process's."""


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
        if name in STATES:
            trainer.save_state(models / f"{name} state")
            trainer.publish(models / "alone" / name / "step", "step-000005")
    return found


@pytest.fixture(scope="module")
def gone_on(models, alone):
    """State -> weights of one process that went on from its own."""
    return {name: two_more(CASES[name].trainer(models), models / f"{name} state") for name in STATES}


def two_more(trainer, state):
    trainer.load_state(state)
    trained(trainer, STEPS, 2)
    return weights_of(trainer)


@pytest.fixture(scope="module")
def several(models, alone, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("several")
    done = by_torchrun(Path(__file__).with_name("train.py"), models, out)
    assert done.returncode == 0, done.stdout[-4000:]
    return out


def read(path):
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize(("name", "way"), TRAINED)
def test_the_weights_after_five_steps_are_those_of_one_process(several, alone, models, name, way):
    found, _ = read(several / way / f"{name}.pt")
    assert furthest(found, alone[name][0]) < FAR[way]
    assert CASES[name].settings.adapter or furthest(found, fresh(models / CASES[name].model)) > 1e-4


@pytest.mark.parametrize(("name", "way"), TRAINED)
def test_an_update_reports_what_all_ranks_measured(several, alone, name, way):
    for found, wanted in zip(read(several / way / f"{name}.pt")[1], alone[name][1], strict=True):
        assert found.adapters.keys() == wanted.adapters.keys()
        for own, its in [(wanted, found), *((report, found.adapters[a]) for a, report in wanted.adapters.items())]:
            for field, value in vars(own).items():
                if isinstance(value, float | int):
                    assert getattr(its, field) == pytest.approx(value, rel=1e-4, abs=1e-6), field


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STATES)
def test_a_state_of_two_ranks_goes_on_in_one_process_and_back(several, gone_on, models, name, way):
    moved = two_more(CASES[name].trainer(models), several / way / f"{name} state")
    assert furthest(moved, gone_on[name]) < FAR[way]
    assert furthest(read(several / way / f"{name} resumed.pt"), gone_on[name]) < FAR[way]


@pytest.mark.parametrize("name", STATES)
def test_ranks_that_share_the_weights_hold_half_of_them_each_and_publish_and_score_them_whole(
    several, alone, models, name
):
    _, scores, held = read(several / "sharded" / f"{name} shown.pt")
    whole = read(several / f"{name} shown.pt")[2]
    assert whole[0] == whole[1] == sum(held)
    assert max(held) < 0.51 * whole[0]
    for file in (models / "alone" / name).rglob("*.safetensors"):
        wanted = load_file(file)
        assert furthest(load_file(several / "sharded" / file.relative_to(models / "alone")), wanted) < 1e-5
    trainer = CASES[name].trainer(models)
    trainer.load_state(models / f"{name} state")
    for found, wanted in zip(scores, trainer.score(TEXTS), strict=True):
        assert found == pytest.approx(wanted, abs=1e-4)


def test_a_rank_that_would_be_idle_reads_a_micro_batch_for_nothing():
    cut = [*micro_batches([Scored((number, 1, 2), 1) for number in range(5)], 3, share=False)]
    shares = [[*in_rounds(cut, rank, 3)] for rank in range(3)]
    assert [[micro.padding for micro in share] for share in shares] == [[False, False], [False, False], [False, True]]
    assert [micro for share in shares for micro in share if not micro.padding] == [cut[i] for i in (0, 3, 1, 4, 2)]
    assert [[*in_rounds([], rank, 2)] for rank in range(2)] == [[], []]


def test_memory_that_runs_out_ends_ranks_that_share_the_weights(models, monkeypatch):
    trainer = Case("untied").trainer(models)
    monkeypatch.setattr(trainer, "sharded", True)
    monkeypatch.setattr(trainer, "_learn", lambda *arguments: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(RankError, match=r"out of memory on rank 0 .* lower micro_batch_tokens"):
        trainer.step(a_batch(0))


@pytest.mark.parametrize("other", [{"adapter": "lora", "quantized_base": "int8"}, {"optimizer": "adamw_8bit"}])
def test_what_cannot_be_shared_out_is_refused(other):
    with pytest.raises(ValueError, match="sharding='fsdp' shares out"):
        TrainingSettings(sharding="fsdp", **other)


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
