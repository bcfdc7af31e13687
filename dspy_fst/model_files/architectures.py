"""What a model's config tells: its class, the longest text it reads, and why it cannot be trained or served.

Except for `load_model`, `load_model_with_info` and `empty_model`, these are functions of a transformers config alone,
so that a run, `dspy-fst sizes` and `dspy-fst check --gpu` agree. Read from transformers 5.19 and vLLM 0.32.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dspy_fst.errors import briefly
from dspy_fst.model_files.reading import read_config

if TYPE_CHECKING:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Names under which configs give the length of the longest text; Bloom and Mamba have no such limit."""
_WITHOUT_A_HEAD_IN_VLLM = {"bloom", "gemma2", "gemma3n", "gemma3n_text"}
"""Model types whose logits vLLM 0.32 computes with the embedding; it has no parameter for a separate head."""
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
"""Model type -> names in config.json that vLLM 0.32 reads and transformers does not. Published models have them."""
_ONE_TOKEN_LONGER = {"cohere2"}
"""Model types whose windows vLLM 0.32 makes of one token more than their config says, and transformers does not."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")


def text_writers() -> set[str]:
    """Names of the model classes that write text, from texts alone or from images too."""
    from transformers.models.auto import modeling_auto as auto

    return {*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}


def load_model(path: str | Path, **options: object) -> "PreTrainedModel":
    """A model that writes text, from its folder or hub name: ``from_pretrained`` of the class that fits its config.

    A model that also reads images is loaded whole if transformers has no class for its text part alone. The model's own
    code is never run.

    Args:
        path: The folder or hub name.
        options: Further arguments of ``from_pretrained``, e.g. ``dtype``.
    """
    config = read_config(path)
    return _auto_class(config).from_pretrained(path, config=config, trust_remote_code=False, **options)


def load_model_with_info(
    path: str | Path, **options: object
) -> "tuple[PreTrainedModel, Mapping[str, Collection[object]]]":
    """`load_model` together with transformers' loading info: kind of fault -> names of the tensors that have it."""
    config = read_config(path)
    load: Callable[..., object] = _auto_class(config).from_pretrained
    loaded = load(path, config=config, trust_remote_code=False, output_loading_info=True, **options)
    assert isinstance(loaded, tuple), "output_loading_info asks for a pair"
    model, info = loaded
    return model, info


def empty_model(config: "PreTrainedConfig") -> "PreTrainedModel":
    """The model of a config on torch's meta device: its tensors have shapes but no numbers, and take no memory.

    Raises:
        Exception: whatever the model's own code raises on a config that it does not understand.
    """
    import torch

    with torch.device("meta"):
        return _auto_class(config).from_config(config, trust_remote_code=False)


def text_part(model: "PreTrainedModel") -> "PreTrainedModel":
    """The part that turns token ids into hidden states: no LM head, no vision or audio tower. The model itself where
    its layers cannot be told from its head."""
    decoder: PreTrainedModel = model.get_decoder()
    # transformers' own search does not find Llama 4's
    return getattr(model, "model", model) if decoder is model else decoder


def _auto_class(config: "PreTrainedConfig") -> "type[AutoModelForCausalLM | AutoModelForImageTextToText]":
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    causal = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def context_length(config: "PreTrainedConfig") -> int | None:
    """Longest prompt plus reply, in tokens, that a model reads with one set of rotary factors; None: no limit.

    Longrope models (Phi-3, Phi-4-mini) switch to other factors when any text of a batch is longer than their original
    length. The result for one text would then depend on the others in its batch, so the original length is the limit.
    """
    text = config.get_text_config()
    limits = [limit for name in _LENGTHS if isinstance(limit := getattr(text, name, None), int) and limit > 0]
    return min([*limits[:1], *_original_lengths(text)], default=None)


def last_position(config: "PreTrainedConfig") -> int | None:
    """Highest position that a text, padding included, may have without failing or changing the other texts of a batch.

    None for models whose rotary embedding computes every position independently, without a limit.
    """
    text = config.get_text_config()
    kinds = [parameters.get("rope_type") for parameters in _rotations(text)]
    limit = context_length(config)
    return limit - 1 if limit is not None and (not kinds or {"longrope", "dynamic"} & set(kinds)) else None


def _original_lengths(text: "PreTrainedConfig") -> Iterator[int]:
    for parameters in _rotations(text):
        if parameters.get("rope_type") == "longrope":
            original = parameters.get("original_max_position_embeddings")
            original = original or getattr(text, "original_max_position_embeddings", None)
            if isinstance(original, int | float) and original:
                yield int(original)


def _rotations(text: "PreTrainedConfig") -> Iterator[Mapping[str, object]]:
    """Parameters of the model's rotary embeddings; some models have one embedding per kind of layer."""
    parameters = getattr(text, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from (value for value in parameters.values() if isinstance(value, Mapping))


def largest(config: "PreTrainedConfig", name: str) -> int | None:
    """A number of the text part's config, and the largest one where it differs between layers; None: it has none."""
    text = config.get_text_config()
    try:
        value = getattr(text, name, None)
    except Exception:  # Gemma 4's head_dim differs between layers, and transformers raises
        layers = text.per_layer_config
        value = [getattr(layer, name, None) for layer in (layers.values() if isinstance(layers, dict) else layers)]
    numbers = [number for number in (value if isinstance(value, list | tuple) else [value]) if isinstance(number, int)]
    return max(numbers, default=None)


def has_experts(config: "PreTrainedConfig") -> bool:
    """Whether the model is a mixture of experts."""
    text = config.get_text_config()
    counts = [getattr(text, name, None) for name in _EXPERTS]
    return any(isinstance(count, int) and count > 1 for count in counts)


def unlike_vllm(config: "PreTrainedConfig", max_model_len: int | None) -> list[str]:
    """Why a vLLM server would not start, or would compute other numbers than the trainer; one sentence per reason.

    Args:
        max_model_len: The server's setting; None leaves it to vLLM.
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


def _window_fault(config: "PreTrainedConfig", max_model_len: int | None) -> str | None:
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


def restart_reason(config: "PreTrainedConfig", *, on_gpu: bool) -> str | None:
    """Why new weights of this model must not be swapped into a running vLLM server; None: they may be.

    On a CPU vLLM packs the weights of experts when it starts. A reload does not update the packed weights, yet answers
    200: the server would use old experts under a new router.
    """
    if not on_gpu and has_experts(config):
        return "on a CPU vLLM keeps the experts of a mixture-of-experts model packed, and a reload does not change them"
    return None


def folder_restart_reason(folder: Path, *, on_gpu: bool) -> str | None:
    """`restart_reason` for a model's folder; None also if its config cannot be read, which other checks report."""
    try:
        config = read_config(folder)
    except Exception:  # a file that somebody else wrote may fail to load with any exception
        return None
    return restart_reason(config, on_gpu=on_gpu)


# ---- why it cannot be trained --------------------------------------------------------------------


SHAPING = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Numbers of a config that shape a model, by transformers' names for them."""


def kind_faults(config: "PreTrainedConfig") -> Iterator[str]:
    """Faults of a model that transformers would load although it writes no text or cannot be trained."""
    classes = config.architectures or []
    if classes and not set(classes) & text_writers():
        # transformers would give it a random head, and report that in its log only.
        yield f"it is a {classes[0]}, which writes no text; choose a causal language model (...ForCausalLM)"
    if quantized := getattr(config, "quantization_config", None):
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else quantized.quant_method
        yield f"its weights are quantized ({method}) and cannot be trained; choose the model in bfloat16 or float32"


def unreadable(path: Path, error: BaseException) -> str:
    """The sentence that transformers cannot read a model's config, and why."""
    missing = "" if path.is_dir() else "there is no such folder, and as a hub model it is "
    return f"{missing}not a model that transformers can read: {briefly(error)}"


def left_out(config: "PreTrainedConfig", written: Mapping[str, object]) -> tuple[str, ...]:
    """Numbers of `SHAPING` that a config.json does not name, so that transformers uses its defaults.

    A text config within another config may leave out some of them, as in published models. There they are reported
    only if all are left out.

    Args:
        config: The config as transformers read it.
        written: The content of config.json.
    """
    text = config.get_text_config()
    names = [name for name in SHAPING if hasattr(text, name)]
    lacking = tuple(name for name in names if not {name, text.attribute_map.get(name)} & set(_keys(written)))
    return lacking if text is config or len(lacking) == len(names) else ()


def _keys(written: Mapping[str, object]) -> Iterator[str]:
    for key, value in written.items():
        yield key
        if isinstance(value, Mapping):
            yield from _keys(value)
