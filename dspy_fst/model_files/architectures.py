"""What a model's config.json tells about its kind: its class, how long its texts may be, what an engine must mind.

But for `load_model` and `empty_model` these are functions of a transformers config alone. Read from transformers 5.19
and vLLM 0.32.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Names under which configs give the longest text; others (Bloom, Mamba) have no such limit."""
_WITHOUT_A_HEAD_IN_VLLM = {"bloom", "gemma2", "gemma3n", "gemma3n_text"}
"""Model types for which vLLM 0.32 multiplies with the embedding and has no place for a head of its own."""
_READ_BY_VLLM_ALONE = {
    "lfm2": ("block_dim", "conv_dim"),
    "deepseek_v3": ("topk_method", "scoring_func"),
    "glm4_moe": ("head_dim",),
    "glm4_moe_lite": ("first_k_dense_replace",),
    "mimo_v2_flash": (
        *("hybrid_layer_pattern", "moe_layer_freq", "layernorm_epsilon", "sliding_window_size"),
        *("swa_num_attention_heads", "swa_num_key_value_heads", "swa_head_dim"),
    ),
    "minimax_m2": ("rotary_dim", "scoring_func", "use_routing_bias"),
}
"""Model type -> names that vLLM 0.32 reads in config.json and transformers does not: published models have them."""
_ONE_TOKEN_LONGER = {"cohere2"}
"""Model types whose windows vLLM 0.32 makes of one token more than their config says, and transformers does not."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")


def text_writers() -> set[str]:
    """Names of the model classes that write text, read from texts alone or from images too."""
    from transformers.models.auto import modeling_auto as auto

    return {*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}


def load_model(path: str | Path, **options: Any) -> Any:
    """A model that writes text, from its folder or hub name: ``from_pretrained`` of the class that fits its config.

    A model that also reads images is loaded whole when transformers has no class for its text part alone.

    Args:
        options: Of ``from_pretrained``. No code of the model's own is run.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    causal = type(config) in AutoModelForCausalLM._model_mapping
    return (AutoModelForCausalLM if causal else AutoModelForImageTextToText).from_pretrained(
        path, trust_remote_code=False, **options
    )


def empty_model(config: Any) -> Any:
    """The model of a config with shapes and without numbers, on torch's meta device: it takes no memory.

    Raises:
        Exception: whatever the model's own code raises on a config that it does not understand.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    causal = type(config) in AutoModelForCausalLM._model_mapping
    with torch.device("meta"):
        return (AutoModelForCausalLM if causal else AutoModelForImageTextToText).from_config(
            config, trust_remote_code=False
        )


def context_length(config: Any) -> int | None:
    """Longest prompt plus reply in tokens that a model reads with one set of position factors; None: no limit.

    Longrope models (Phi-3, Phi-4-mini) rotate with other factors when any text of a batch is longer than their
    original length, so that what a token means would depend on the texts beside it. The original length is their limit.
    """
    text = config.get_text_config()
    limits = [limit for name in _LENGTHS if isinstance(limit := getattr(text, name, None), int) and limit > 0]
    return min([*limits[:1], *_original_lengths(text)], default=None)


def last_position(config: Any) -> int | None:
    """Highest position that a text, padding included, may hold without changing or failing the texts beside it.

    None for models whose rotary embeddings turn every position by itself, however many there are.
    """
    text = config.get_text_config()
    kinds = [parameters.get("rope_type") for parameters in _rotations(text)]
    limit = context_length(config)
    return limit - 1 if limit is not None and (not kinds or {"longrope", "dynamic"} & set(kinds)) else None


def _original_lengths(text: Any) -> Iterator[int]:
    for parameters in _rotations(text):
        if parameters.get("rope_type") == "longrope":
            original = parameters.get("original_max_position_embeddings")
            original = original or getattr(text, "original_max_position_embeddings", None)
            if original:
                yield int(original)


def _rotations(text: Any) -> Iterator[Mapping[str, Any]]:
    """Parameters of the model's rotary embeddings; some have one for each kind of layer."""
    parameters = getattr(text, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from (value for value in parameters.values() if isinstance(value, Mapping))


def largest(config: Any, name: str) -> int | None:
    """A number of the text part's config; of one that its layers have each for itself, the largest; None: not there."""
    text = config.get_text_config()
    try:
        found = getattr(text, name, None)
    except Exception:  # Gemma 4's head_dim: transformers refuses to say one for all layers
        layers = text.per_layer_config
        found = [getattr(layer, name, None) for layer in (layers.values() if isinstance(layers, dict) else layers)]
    numbers = [number for number in (found if isinstance(found, list | tuple) else [found]) if isinstance(number, int)]
    return max(numbers, default=None)


def has_experts(config: Any) -> bool:
    """Whether the model is a mixture of experts."""
    text = config.get_text_config()
    counts = [getattr(text, name, None) for name in _EXPERTS]
    return any(isinstance(count, int) and count > 1 for count in counts)


def unlike_vllm(config: Any, max_model_len: int | None) -> list[str]:
    """Why a vLLM server would not start, or would compute other numbers than the trainer, one sentence each.

    Args:
        max_model_len: What the server is told; None leaves it to vLLM.
    """
    faults = []
    text = config.get_text_config()
    if {config.model_type, text.model_type} & _WITHOUT_A_HEAD_IN_VLLM:
        faults.append(
            f"vLLM has no place for an LM head of its own in a {config.model_type!r} model, and published weights hold "
            "one, so its server would not start; use engine='in_process'"
        )
    if lacking := [name for name in _READ_BY_VLLM_ALONE.get(text.model_type, ()) if not hasattr(text, name)]:
        faults.append(
            f"vLLM reads {' and '.join(lacking)} in the config.json of a {text.model_type!r} model, and this one lacks "
            "it, so its server would not start; copy it from the published model's, or use engine='in_process'"
        )
    if fault := _window_fault(config, max_model_len):
        faults.append(fault)
    if any(parameters.get("rope_type") == "dynamic" and "alpha" not in parameters for parameters in _rotations(text)):
        faults.append(
            "its rotary embedding is scaled by 'dynamic', which vLLM scales for short texts too and transformers does "
            "not, so the two disagree; use engine='in_process', or remove the scaling from config.json and stay within "
            "max_position_embeddings"
        )
    originals, limit = list(_original_lengths(text)), context_length(config)
    if originals and limit is not None and max_model_len is not None and max_model_len > limit:
        faults.append(
            f"max_model_len={max_model_len}: its rotary embedding is scaled by 'longrope', and beyond its original "
            f"length of {limit} tokens vLLM turns short texts by the factors of long ones; set max_model_len to "
            f"{limit} or less"
        )
    return faults


def _window_fault(config: Any, max_model_len: int | None) -> str | None:
    """Why texts longer than a window would get other numbers from vLLM; None: they do not, or there are none."""
    text = config.get_text_config()
    window, longest = getattr(text, "sliding_window", None), max_model_len or context_length(config)
    if text.model_type not in _ONE_TOKEN_LONGER or "sliding_attention" not in text.layer_types or window is None:
        return None
    if longest is not None and longest <= window:
        return None
    return (
        f"vLLM lets a token of a {config.model_type!r} model see one token more than its window of {window}, so in "
        "longer texts the two disagree; set engine_options={'max_model_len': "
        f"{window}}} or less, or use engine='in_process'"
    )


def restart_reason(config: Any, *, on_gpu: bool) -> str | None:
    """Why new weights of this model must not be swapped into a running vLLM server; None: they may.

    On a CPU vLLM repacks the weights of experts when it starts; a reload leaves the packed ones as they were, answers
    200, and serves old experts under a new router.
    """
    if not on_gpu and has_experts(config):
        return "on a CPU vLLM keeps the experts of a mixture-of-experts model packed, and a reload does not change them"
    return None


def folder_restart_reason(folder: Path, *, on_gpu: bool) -> str | None:
    """`restart_reason` of a model's folder; None also where its config cannot be read, which others tell better."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # files of others may break in any way
        return None
    return restart_reason(config, on_gpu=on_gpu)
