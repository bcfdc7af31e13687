"""What vLLM computes otherwise than the trainer: refused where it would show, served where it does not."""

import dataclasses

import pytest

from benchmarks.architectures_vllm import as_run
from benchmarks.families import FAMILIES
from dspy_fst.model_files.architectures import unlike_vllm
from dspy_fst.preflight.vllm_start import vllm_faults

BY_NAME = {family.name: family for family in FAMILIES}


@pytest.mark.parametrize("options", [{}, {"dtype": "auto"}, {"dtype": "float"}], ids=["unsaid", "auto", "float"])
def test_a_server_whose_dtype_is_not_said_computes_in_float32_on_a_cpu(options):
    config = BY_NAME["Qwen3-Next"].config()
    (fault,) = vllm_faults(config, options, on_gpu=False)
    assert "in bfloat16 alone, and its server would not start in float32" in fault
    assert list(vllm_faults(config, options, on_gpu=True)) == []


def test_a_nemotron_without_experts_is_not_refused():
    config = dataclasses.replace(
        BY_NAME["Nemotron-H"], told={"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]}
    ).config()
    assert list(vllm_faults(config, {}, on_gpu=False)) == []


@pytest.mark.parametrize(
    ("dtype", "on_gpu", "refused"),
    [(None, False, "float32"), (None, True, None), ("half", True, "float16"), ("bfloat16", False, None)],
    ids=["unsaid-cpu", "unsaid-gpu", "half-gpu", "bfloat16-cpu"],
)
def test_an_activation_that_vllm_keeps_in_bfloat16_is_served_in_bfloat16_alone(dtype, on_gpu, refused):
    """A server in float32 rounds xIELU's two weights, and the tokens are 0.002 nats off."""
    faults = list(vllm_faults(BY_NAME["Apertus"].config(), {} if dtype is None else {"dtype": dtype}, on_gpu=on_gpu))
    says = (
        f"vLLM keeps the activation of a 'apertus' model in bfloat16, so in {refused} it gives the tokens other "
        "log-probabilities than the trainer; set engine_options={'dtype': 'bfloat16'} and precision='bfloat16', or use "
        "engine='in_process'"
    )
    assert faults == ([] if refused is None else [says])


def test_a_window_that_vllm_makes_one_token_longer_is_the_longest_text():
    """The token that transformers has let go is seen by vLLM's attention: 0.1 nats, on texts beyond the window."""
    short, long = BY_NAME["Cohere 2, within a window"].config(), BY_NAME["Cohere 2"].config()
    assert unlike_vllm(short, None) == []
    assert unlike_vllm(long, 8) == []
    assert unlike_vllm(short, 257) != []
    for told in (None, 9):
        assert unlike_vllm(long, told) == [
            "vLLM lets a token of a 'cohere2' model see one token more than its window of 8, so in longer texts the "
            "two disagree; set engine_options={'max_model_len': 8} or less, or use engine='in_process'"
        ]


@pytest.mark.parametrize(
    ("name", "said", "shown"),
    [
        ("Mixtral", "equal; reloaded: off by 7", "equal; started anew"),
        ("Mixtral", "off by 1; reloaded: off by 7", "off by 1; started anew"),
        ("Qwen3", "equal; reloaded: off by 7", "equal; reloaded: off by 7"),
    ],
    ids=["experts", "experts-off", "dense"],
)
def test_the_page_s_column_says_what_a_run_meets(name, said, shown):
    """A mixture's experts are never reloaded on a CPU, and a fault at its start must still show."""
    assert as_run(name, said) == shown
