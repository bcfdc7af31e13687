"""A program whose predictors speak through LoRA adapters of their own, served behind a real vLLM server."""

import pytest

import dspy_fst
from dspy_fst.policy_lm import policy_of
from tests.lora_program import two_adapters
from tests.serve.command import serving
from tests.serve.test_lora_models import SIGNATURE, check


@pytest.mark.vllm
def test_behind_vllm_too(tmp_path):
    program = two_adapters(tmp_path / "weights")
    saved = dspy_fst.save(program, tmp_path / "saved")
    with serving(saved, "--program", "tests.relay:Relay", "--engine", "vllm", "--signature", SIGNATURE) as server:
        server.wait_for(server.ready, "it is ready")
        check(server.url, server.auth, program)
    policy_of(program).release()
