"""Moments of 8 bits: close to those of 32, a quarter of their size on disk, and exact when a run goes on."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file

from dspy_fst.errors import TrainingError
from dspy_fst.preflight.library_checks import library_faults
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from tests.slow.makers import save_model
from tests.slow.test_checkpoint import draw_batch, make_trainer

EIGHT = {"optimizer": "adamw_8bit", "kl_coefficient": 0.0}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model with parameters of 4,096 numbers and more, whose moments are rounded, and smaller ones."""
    return save_model(tmp_path_factory.mktemp("wide") / "model", width=64)


@pytest.fixture(autouse=True)
def library(request):
    if "missing" not in request.node.name:
        pytest.importorskip("bitsandbytes")


def moved(trainer: Trainer, start: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([(p.detach() - start[name]).flatten() for name, p in trainer.parameters.items()])


def test_updates_with_moments_of_8_bits_go_the_way_of_those_with_32(wide):
    low, high = make_trainer(wide, **EIGHT), make_trainer(wide, kl_coefficient=0.0)
    start = {name: p.detach().clone() for name, p in low.parameters.items()}
    for seed in range(4):
        low.step(draw_batch(seed))
        high.step(draw_batch(seed))
    ours, wanted = moved(low, start), moved(high, start)
    assert not torch.equal(ours, wanted)
    assert float(torch.cosine_similarity(ours, wanted, dim=0)) > 0.995
    assert float(ours.norm() / wanted.norm()) == pytest.approx(1, abs=0.03)


def test_a_state_holds_a_byte_for_each_moment_of_a_large_parameter(wide, tmp_path):
    trainer = make_trainer(wide, **EIGHT)
    trainer.step(draw_batch(0))
    trainer.save_state(tmp_path / "state")
    state = load_file(tmp_path / "state" / "state.safetensors")
    up, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    for moment in ("1", "2"):
        codes, scales = state[f"state{moment}/{up}"], state[f"absmax{moment}/{up}"]
        assert (codes.dtype, codes.numel()) == (torch.uint8, 64 * 128)
        assert (scales.dtype, scales.numel()) == (torch.float32, 64 * 128 / 256)
        assert state[f"state{moment}/{norm}"].dtype == torch.float32
    assert int(state[f"step/{up}"]) == 1


def test_a_resumed_trainer_with_moments_of_8_bits_goes_on_bit_for_bit(wide, tmp_path):
    steady, early = make_trainer(wide, **EIGHT), make_trainer(wide, **EIGHT)
    for seed in range(3):
        steady.step(draw_batch(seed))
        early.step(draw_batch(seed))
    early.save_state(tmp_path / "state")
    late, anew = make_trainer(wide, **EIGHT), make_trainer(wide, **EIGHT)
    late.load_state(tmp_path / "state")
    anew.load_state(tmp_path / "state")
    anew._optimizer.state.clear()
    for seed in range(3, 6):
        assert late.step(draw_batch(seed)) == steady.step(draw_batch(seed))
        anew.step(draw_batch(seed))
    assert all(torch.equal(p, late.parameters[name]) for name, p in steady.parameters.items())
    assert not all(torch.equal(p, anew.parameters[name]) for name, p in steady.parameters.items())


def test_moments_of_8_bits_are_taken_over_by_a_run_that_goes_on(wide, tmp_path):
    trainer = make_trainer(wide, **EIGHT)
    for seed in range(2):
        trainer.step(draw_batch(seed))
    trainer.save_state(tmp_path / "state")
    taking = make_trainer(trainer.publish(tmp_path / "weights", "step-000002").path, **EIGHT)
    assert taking.load_optimizer(tmp_path / "state") == []
    for one in (trainer, taking):
        one.step(draw_batch(2))
    assert all(tensor.equal(trainer.parameters[name]) for name, tensor in taking.parameters.items())


@pytest.mark.parametrize(("wrote", "reads"), [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")])
def test_moments_of_the_other_kind_are_refused(wide, tmp_path, wrote, reads):
    trainer = make_trainer(wide, optimizer=wrote)
    trainer.step(draw_batch(0))
    trainer.save_state(tmp_path / "state")
    with pytest.raises(TrainingError, match=r"moments of (32|8) bits, and this optimizer's have (32|8)$"):
        make_trainer(wide, optimizer=reads).load_optimizer(tmp_path / "state")


def test_a_missing_library_is_told_before_any_work(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "dspy_fst.preflight.library_checks.find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    (fault,) = library_faults(TrainingSettings(optimizer="adamw_8bit"))
    assert fault == (
        "optimizer='adamw_8bit' needs bitsandbytes, which is not installed: pip install 'dspy-fst[quantized]', or use "
        "'adamw'"
    )
    assert list(library_faults(TrainingSettings())) == []


def test_a_trainer_whose_library_is_missing_says_so(wide, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(TrainingError, match="optimizer='adamw_8bit': bitsandbytes cannot be imported"):
        make_trainer(wide, **EIGHT)
