"""Predicts that a vLLM server would not start on this machine, or would compute other numbers than the trainer.

The sources are the model's config, the engine's options and the installed packages. `benchmarks.architectures` measured
the families with vLLM 0.32 on a CPU. Nothing is known about an attached server, which may run elsewhere.
"""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

from dspy_fst.model_files.architectures import unlike_vllm
from dspy_fst.preflight.precision import resolved

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_BESIDE_IMAGES = {"qwen3_5_text", "qwen3_5_moe_text"}
"""Text models whose vLLM code is in the module of the image model, which imports torchvision."""
_DELTA_NETS = {"qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "olmo_hybrid"}
"""Model types whose linear attention vLLM computes only in bfloat16 on a CPU."""
_OTHER_NUMBERS_ON_A_CPU = {"lfm2", "lfm2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe_lite"}
"""Model types for which vLLM on a CPU scores only the first token correctly: LFM2's convolution over tokens is off by
0.2 nats, the latent attention of the others by 2 nats (tiny models with DeepSeek's own number of latents)."""
_NO_CODE = {
    "phimoe",  # transformers writes another class name than vLLM knows
    *("bamba", "minimax", "recurrent_gemma", "xlstm", "zamba"),  # layers without attention
    *("codegen", "cpmant", "gpt_neo", "gpt_neox_japanese", "mpt", "openai-gpt", "reformer", "rwkv", "xglm", "xlm"),
    "xlnet",
}
"""Model types of transformers for which vLLM 0.32 has no class (read from its `ModelRegistry`).

vLLM cannot run them through transformers' own code either: that needs every layer to call transformers' attention
interface.
"""
_HALF_A_HEAD = {"youtu"}
"""Model types whose ``head_dim`` is only the rotated part of a head; vLLM takes it for the whole and ends at a text."""
_ZERO_EXPERTS = {"longcat_flash"}
"""Model types for which transformers writes tensors of experts that have no weights; vLLM has no parameter for them."""
_BFLOAT16_ACTIVATIONS = {"apertus"}
"""Model types whose activation has weights (xIELU) that vLLM keeps in bfloat16, whatever the server's dtype is."""
_RECURRENT = {"mamba", "falcon_mamba", "jamba", "kimi_linear"}
"""Model types whose recurrent layers have no CPU kernel in vLLM; Mamba 2 has other layers."""
_OTHER_EXPERTS = {"nemotron_h", "minimax_m2"}
"""Model types whose experts have no CPU kernel in vLLM: Nemotron's have no gate, MiniMax M2 chooses by a sigmoid."""
_WIDER_KEYS = {"mimo_v2_flash"}
"""Model types whose keys are wider than their values; vLLM has no CPU kernel for such attention."""
_NO_RELOAD_ON_A_CPU = {"zamba2"}
"""Model types whose reload fails on a CPU: Zamba 2's layers share a block, which vLLM packs at its start."""


def vllm_faults(config: "PreTrainedConfig", options: Mapping[str, object], *, on_gpu: bool) -> Iterator[str]:
    """Why a vLLM server would not serve this model as the trainer computes it, one sentence each.

    Args:
        config: The model's transformers config.
        options: The engine's options; ``max_model_len``, ``dtype`` and ``attach_url`` are read.
    """
    longest = options.get("max_model_len")
    yield from unlike_vllm(config, longest if isinstance(longest, int) else None)
    if options.get("attach_url") is None:
        yield from _faults_here(config, options, on_gpu)


def _faults_here(config: "PreTrainedConfig", options: Mapping[str, object], on_gpu: bool) -> Iterator[str]:
    text = config.get_text_config()
    kinds, kind = {config.model_type, text.model_type}, repr(config.model_type)
    dtype = resolved(str(options.get("dtype") or "auto"), on_gpu=on_gpu)
    if (text is not config or kinds & _BESIDE_IMAGES) and find_spec("torchvision") is None:
        yield (
            f"vLLM's code for a {kind} model imports torchvision, which is not installed, so its server would not "
            "start; install torchvision, or use engine='in_process'"
        )
    if kinds & _NO_CODE:
        yield f"vLLM has no code for a {kind} model as transformers writes it; use engine='in_process'"
    if kinds & _HALF_A_HEAD:
        yield (
            f"vLLM takes the rotated part of a {kind} model's heads for a whole head, so its server would end at the "
            "first text; use engine='in_process'"
        )
    if kinds & _ZERO_EXPERTS:
        yield (
            f"transformers writes weights of the experts that do nothing in a {kind} model, for which vLLM has no "
            "place, so its server would not start; use engine='in_process'"
        )
    if kinds & _BFLOAT16_ACTIVATIONS and dtype != "bfloat16":
        yield (
            f"vLLM keeps the activation of a {kind} model in bfloat16, so in {dtype} it gives the tokens other "
            "log-probabilities than the trainer; set engine_options={'dtype': 'bfloat16'} and precision='bfloat16', or "
            "use engine='in_process'"
        )
    if not on_gpu:
        yield from _faults_on_a_cpu(kinds, kind, text, dtype)


def _faults_on_a_cpu(kinds: set[str], kind: str, text: "PreTrainedConfig", dtype: str) -> Iterator[str]:
    if kinds & _DELTA_NETS and dtype != "bfloat16":
        yield (
            f"on a CPU vLLM computes the linear attention of a {kind} model in bfloat16 alone, and its server would "
            f"not start in {dtype}; set engine_options={{'dtype': 'bfloat16'}} and precision='bfloat16', or use "
            "engine='in_process'"
        )
    if kinds & _RECURRENT:
        yield (
            f"on a CPU vLLM has no kernel for the recurrent layers of a {kind} model, so its server would not start; "
            "use engine='in_process'"
        )
    if kinds & _OTHER_EXPERTS and "moe" in getattr(text, "layer_types", ("moe",)):
        yield (
            f"on a CPU vLLM has no kernel for the experts of a {kind} model, so its server would not start; "
            "use engine='in_process'"
        )
    if kinds & _WIDER_KEYS:
        yield (
            f"on a CPU vLLM has no kernel for the attention of a {kind} model, so its server would not start; "
            "use engine='in_process'"
        )
    if kinds & _NO_RELOAD_ON_A_CPU:
        yield (
            f"on a CPU vLLM fails to load new weights into a running server of a {kind} model, so no publish would "
            "arrive; use engine='in_process'"
        )
    if kinds & _OTHER_NUMBERS_ON_A_CPU:
        yield (
            f"on a CPU vLLM gives the tokens of a {kind} model other log-probabilities than transformers, so no "
            "publish would pass the check; use engine='in_process'"
        )
