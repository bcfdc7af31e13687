"""compile() with moments of 8 bits, end to end on the laboratory's base model."""

import pytest
import torch
from safetensors.torch import load_file

from dspy_fst import ConfigurationError
from dspy_fst.policy_lm import policy_of
from dspy_fst.run.directory import read_events
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
