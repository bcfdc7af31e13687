"""What ends the start of a vLLM server on this machine, or makes it compute other numbers here, seen before it starts.

From the model's config, the engine's options and what is installed. Measured with vLLM 0.32 on a CPU, family by family:
`benchmarks.architectures`. An attached server is somebody else's and runs elsewhere: nothing is known of it.
"""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from dspy_fst.model_files.architectures import unlike_vllm

_BESIDE_IMAGES = {"qwen3_5_text", "qwen3_5_moe_text"}
"""Text models whose code in vLLM stands beside that of the model that reads images, and imports what that needs."""
_DELTA_NETS = {"qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "olmo_hybrid"}
"""Model types whose linear attention vLLM computes on a CPU in bfloat16 alone."""
_OTHER_NUMBERS_ON_A_CPU = {"lfm2", "lfm2_moe", "deepseek_v2", "deepseek_v3"}
"""Model types of which vLLM scores only the first token right on a CPU: LFM2's convolution over tokens is 0.2 nats off,
the latent attention of DeepSeek 2 (measured on tiny models, with as many latent numbers as DeepSeek's own)."""
_NO_CODE = {"phimoe"}
"""Model types that vLLM knows under another class than transformers writes, and does not start as that."""
_SELECTIVE_SCANS = {"mamba", "falcon_mamba", "jamba"}
"""Model types for whose recurrent layers vLLM has no kernel on a CPU; those of Mamba 2 are another kind."""
_NOT_BFLOAT16 = ("float", "float32", "half", "float16")


def vllm_faults(config: Any, options: Mapping[str, Any], *, on_gpu: bool) -> Iterator[str]:
    """Why a vLLM server would not serve this model as the trainer computes it, one sentence each.

    Args:
        config: The model's, of transformers.
        options: Of the engine; ``max_model_len``, ``dtype`` and ``attach_url`` are read.
    """
    yield from unlike_vllm(config, options.get("max_model_len"))
    if options.get("attach_url") is None:
        yield from _faults_here(config, options, on_gpu)


def _faults_here(config: Any, options: Mapping[str, Any], on_gpu: bool) -> Iterator[str]:
    text = config.get_text_config()
    kinds, kind = {config.model_type, text.model_type}, repr(config.model_type)
    if (text is not config or kinds & _BESIDE_IMAGES) and find_spec("torchvision") is None:
        yield (
            f"vLLM's code for a {kind} model imports torchvision, which is not installed, so its server would not "
            "start; install torchvision, or use engine='in_process'"
        )
    if kinds & _NO_CODE:
        yield f"vLLM has no code for a {kind} model as transformers writes it; use engine='in_process'"
    if on_gpu:
        return
    if kinds & _DELTA_NETS and options.get("dtype") in _NOT_BFLOAT16:
        yield (
            f"on a CPU vLLM computes the linear attention of a {kind} model in bfloat16 alone, and its server would "
            f"not start in {options['dtype']}; set engine_options={{'dtype': 'bfloat16'}} and precision='bfloat16', "
            "or use engine='in_process'"
        )
    if kinds & _SELECTIVE_SCANS:
        yield (
            f"on a CPU vLLM has no kernel for the recurrent layers of a {kind} model, so its server would not start; "
            "use engine='in_process'"
        )
    if kinds & _OTHER_NUMBERS_ON_A_CPU:
        yield (
            f"on a CPU vLLM gives the tokens of a {kind} model other log-probabilities than transformers, so no "
            "publish would pass the check; use engine='in_process'"
        )
