"""Predicts that a vLLM server would not start on this machine, or would compute other numbers than the trainer.

The sources are the model's config, the engine's options and the installed packages. `benchmarks.architectures` measured
the families with vLLM 0.32 on a CPU. Nothing is known about an attached server, which may run elsewhere.
"""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from dspy_fst.model_files.architectures import unlike_vllm

_BESIDE_IMAGES = {"qwen3_5_text", "qwen3_5_moe_text"}
"""Text models whose vLLM code is in the module of the image model, which imports torchvision."""
_DELTA_NETS = {"qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "olmo_hybrid"}
"""Model types whose linear attention vLLM computes only in bfloat16 on a CPU."""
_OTHER_NUMBERS_ON_A_CPU = {"lfm2", "lfm2_moe", "deepseek_v2", "deepseek_v3"}
"""Model types for which vLLM on a CPU scores only the first token correctly: LFM2's convolution over tokens is off by
0.2 nats, DeepSeek's latent attention by 2 nats (measured on tiny models with DeepSeek's own number of latents)."""
_NO_CODE = {"phimoe"}
"""Model types for which transformers writes another class name than vLLM knows, so vLLM does not start."""
_SELECTIVE_SCANS = {"mamba", "falcon_mamba", "jamba"}
"""Model types whose recurrent layers have no CPU kernel in vLLM; Mamba 2 has other layers."""
_NOT_BFLOAT16 = ("float", "float32", "half", "float16")


def vllm_faults(config: Any, options: Mapping[str, Any], *, on_gpu: bool) -> Iterator[str]:
    """Why a vLLM server would not serve this model as the trainer computes it, one sentence each.

    Args:
        config: The model's transformers config.
        options: The engine's options; ``max_model_len``, ``dtype`` and ``attach_url`` are read.
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
