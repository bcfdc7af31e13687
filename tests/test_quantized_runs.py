"""compile() with moments of 8 bits, and on a base in 4 or 8 bits, end to end on the laboratory's base model."""

import pytest
import torch
from safetensors.torch import load_file

import dspy_fst
from dspy_fst import ConfigurationError, LoRA
from dspy_fst.policy_lm import policy_of
from dspy_fst.run.directory import read_events
from dspy_fst.saving.export import export
from dspy_fst.training.result import start_of
from tests.relay import relay
from tests.test_compile import compile_relay, same_weights, told

pytest.importorskip("bitsandbytes", reason="pip install 'dspy-fst[quantized]'")

pytestmark = pytest.mark.slow
EIGHT = {"optimizer": "adamw_8bit", "method": "rl", "cycles": 1, "steps_per_cycle": 3}


class KilledError(Exception):
    pass


def kill(event):
    if event["event"] == "step" and event["report"]["step"] == 1:
        raise KilledError  # after the event was written and before the state was committed


def test_a_killed_run_with_moments_of_8_bits_equals_an_uninterrupted_one(tmp_path):
    whole = compile_relay(tmp_path / "whole", **EIGHT)
    with pytest.raises(KilledError):
        compile_relay(tmp_path / "killed", listeners=[kill], **EIGHT)
    resumed = compile_relay(tmp_path / "killed", **EIGHT)
    assert same_weights(whole, resumed)
    kept = [[told(event) for event in read_events(tmp_path / name)] for name in ("whole", "killed")]
    assert kept[0] == kept[1]
    states = sorted((tmp_path / "whole" / "states").iterdir())
    state = load_file(states[-1] / "trainer" / "state.safetensors")
    assert torch.uint8 in {tensor.dtype for name, tensor in state.items() if name.startswith("state1/")}
    for program in (whole, resumed):
        policy_of(program).release()
    with pytest.raises(ConfigurationError, match=r"optimizer \(there 'adamw_8bit', now 'adamw'\)"):
        compile_relay(tmp_path / "whole", **{**EIGHT, "optimizer": "adamw"})
    other = {**EIGHT, "optimizer": "adamw", "continue_optimizer": True}
    with pytest.raises(ConfigurationError, match="kept AdamW's moments as optimizer='adamw_8bit' does, and this one"):
        compile_relay(tmp_path / "further", program=whole, **other)


# ---- a base in 4 or 8 bits ----------------------------------------------------------------------

ROUNDED = {
    **{"adapter": LoRA(rank=8), "learning_rate": 5e-3, "warmup_steps": 0, "method": "rl", "cycles": 1},
    **{"steps_per_cycle": 5, "group_size": 8, "population_size": 1, "quantized_base": "nf4"},
}
SEQUENCES = [[5, 6, 7, 8, 9], [11, 3, 2, 40, 17, 8]]


def served(program) -> torch.Tensor:
    return torch.tensor([value for row in policy_of(program).handle.ready().score(SEQUENCES) for value in row])


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("rounded") / "run"
    compiled = compile_relay(run_dir, **ROUNDED)
    yield run_dir, compiled
    policy_of(compiled).release()


def test_a_run_on_a_base_in_4_bits_learns_and_samples_what_it_scores(rounded):
    run_dir, compiled = rounded
    steps = [event["report"] for event in read_events(run_dir) if event["event"] == "step"]
    assert max(step["update"]["max_log_ratio"] for step in steps) < 1e-4
    assert steps[-1]["reward"] > 1.3 * steps[0]["reward"]
    base = load_file(policy_of(compiled).checkpoint.path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    block = base[name].flatten()[:64]
    assert len((block / block.abs().max()).unique()) <= 16


def test_a_killed_run_on_a_base_in_4_bits_equals_an_uninterrupted_one(rounded, tmp_path):
    run_dir, whole = rounded
    with pytest.raises(KilledError):
        compile_relay(tmp_path / "killed", listeners=[kill], **ROUNDED)
    resumed = compile_relay(tmp_path / "killed", **ROUNDED)
    files = [policy_of(one).checkpoint.adapters[0].path / "adapter_model.safetensors" for one in (whole, resumed)]
    first, second = (load_file(path) for path in files)
    assert all(first[name].equal(second[name]) for name in first)
    kept = [[told(event) for event in read_events(path)] for path in (run_dir, tmp_path / "killed")]
    assert kept[0] == kept[1]
    policy_of(resumed).release()
    with pytest.raises(ConfigurationError, match=r"quantized_base \(there 'nf4', now None\)"):
        compile_relay(run_dir, **{**ROUNDED, "quantized_base": None})


def test_a_program_on_a_rounded_base_is_saved_exported_and_gone_on_from(rounded, tmp_path):
    run_dir, compiled = rounded
    out = export(run_dir, tmp_path / "out")
    assert "its linear layers hold numbers that were rounded to nf4" in (out / "README.md").read_text()
    loaded = dspy_fst.load(out, relay(), engine="in_process")
    assert torch.allclose(served(loaded), served(compiled), atol=1e-4)
    adapters = export(run_dir, tmp_path / "adapters", lora=True)
    assert "Its linear layers were rounded to nf4 before the training" in (adapters / "README.md").read_text()
    further = compile_relay(tmp_path / "further", program=compiled, **{**ROUNDED, "steps_per_cycle": 1})
    bases = [load_file(one.path / "model.safetensors") for one in (policy_of(compiled).checkpoint, start_of(further))]
    assert all(bases[0][name].equal(bases[1][name]) for name in bases[0])
    for program in (loaded, further):
        policy_of(program).release()
