"""Tiny random models of the architectures that people have: made from transformers' own configs, in a moment.

Each keeps what is peculiar to its family (windows, experts, recurrent layers, scaled logits, a vision tower beside it)
at a width of 64 and reads and writes with the laboratory's tokenizer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)

from programs.lab import BASE

SMALL: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim", "kv_lora_rank"), 16),
    **dict.fromkeys(("state_size", "mamba_d_state", "mamba_d_head", "ssm_state_size", "mamba_head_dim"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "linear_num_value_heads"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups", "first_k_dense_replace"), 1),
    **dict.fromkeys(("mamba_n_heads", "num_heads", "mamba_num_heads", "sliding_window"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    "vocab_size": 594,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.1,
}
"""What a config is told, by the names that it knows."""


@dataclass(frozen=True)
class Family:
    """One architecture."""

    name: str
    """As people call it."""
    model_type: str
    told: Mapping[str, Any] = field(default_factory=dict)
    """On top of `SMALL`; a value of None leaves the config's own."""
    beside: Mapping[str, Any] = field(default_factory=dict)
    """Of the towers beside the text part."""
    multimodal: bool = False
    """Whether it is stored as a model that also reads images."""
    wide: bool = True
    """Whether all matrices are drawn wider than they are by themselves, so that replies are far from uniform."""

    def make(self, seed: int = 0) -> PreTrainedModel:
        """The model, in float32."""
        torch.manual_seed(seed)
        maker = AutoModelForImageTextToText if self.multimodal else AutoModelForCausalLM
        model = maker.from_config(self.config()).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if self.wide and parameter.ndim > 1 and "embed" not in name:
                    parameter.mul_(2.0)
        return model

    def config(self) -> Any:
        """Its tiny configuration."""
        whole = CONFIG_MAPPING[self.model_type]
        default = whole(**self.beside)
        text = default.get_text_config()
        told = {name: value for name, value in SMALL.items() if knows(text, name)} | dict(self.told)
        told = {name: value for name, value in told.items() if value is not None or name in ("sliding_window",)}
        if text is default:
            return whole(**told)
        part = next(name for name in default.sub_configs if getattr(default, name) is text)
        settings: dict[str, Any] = {part: type(text)(**told), **self.beside}
        return whole(**settings)

    def save(self, folder: Path, seed: int = 0) -> Path:
        """Write it as a Hugging Face folder with the laboratory's tokenizer and chat template."""
        self.make(seed).save_pretrained(folder)
        AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
        return folder


def knows(config: Any, name: str) -> bool:
    """Whether a config has a setting of this name that can be told."""
    try:
        return hasattr(config, name) and not (
            isinstance(getattr(type(config), name, None), property) and getattr(type(config), name).fset is None
        )
    except Exception:  # a property that several layers answer differently
        return False


_LATENT = {"head_dim": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4}
_MIXED = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
_WINDOWED = ["sliding_attention", "full_attention"] * 2
_VISION = {
    "vision_config": {
        **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"image_size": 32, "patch_size": 16},
    }
}
_VISION2 = {
    "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
}
_VISION3 = {
    "vision_config": {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
    }
}
_LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 10000.0}

FAMILIES: tuple[Family, ...] = (
    Family("Llama", "llama"),
    Family("Llama, tied", "llama", {"tie_word_embeddings": True}),
    Family(
        "Llama 3.1 (llama3 rope)",
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    Family(
        "Llama, dynamic rope",
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    Family(
        "Llama, YaRN",
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    Family("Llama 4 (text)", "llama4_text", {"num_experts_per_tok": 1}),
    Family("Qwen2", "qwen2"),
    Family("Qwen2-MoE", "qwen2_moe"),
    Family("Qwen3", "qwen3"),
    Family("Qwen3-MoE", "qwen3_moe"),
    Family("Qwen3-Next", "qwen3_next", {"layer_types": _MIXED}),
    Family("Qwen3.5", "qwen3_5", {"layer_types": _MIXED}, _VISION3, multimodal=True),
    Family("Qwen3.5 (text)", "qwen3_5_text", {"layer_types": _MIXED}),
    Family("Qwen3.5-MoE (text)", "qwen3_5_moe_text", {"layer_types": _MIXED}),
    Family("Gemma", "gemma"),
    Family("Gemma 2", "gemma2", {"final_logit_softcapping": 1.5}),
    Family("Gemma 3 (text)", "gemma3_text", {"layer_types": _WINDOWED}),
    Family(
        "Gemma 3 (multimodal)",
        "gemma3",
        {"layer_types": _WINDOWED},
        {**_VISION, "mm_tokens_per_image": 4},
        multimodal=True,
    ),
    Family(
        "Gemma 3n (text)",
        "gemma3n_text",
        {
            "layer_types": _WINDOWED,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 594,
            "num_kv_shared_layers": 1,
            "laurel_rank": 8,
            "intermediate_size": [128] * 4,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        },
    ),
    Family(
        "Gemma 4 (text)",
        "gemma4_text",
        {
            "layer_types": _WINDOWED,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 594,
            "final_logit_softcapping": 3.0,
            "num_experts": None,
        },
    ),
    Family("Mistral", "mistral"),
    Family("Mistral, no window", "mistral", {"sliding_window": None}),
    Family("Mistral 3 (multimodal)", "mistral3", {}, _VISION, multimodal=True),
    Family(
        "Qwen2.5-VL",
        "qwen2_5_vl",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}},
        _VISION2,
        multimodal=True,
    ),
    Family("Ministral", "ministral"),
    Family("Ministral 3", "ministral3"),
    Family("Mixtral", "mixtral"),
    Family("Phi", "phi"),
    Family("Phi-3", "phi3", {"sliding_window": None}),
    Family(
        "Phi-3, longrope",
        "phi3",
        {"sliding_window": None, "original_max_position_embeddings": 128, "rope_parameters": _LONG},
    ),
    Family("Phi-3.5-MoE", "phimoe"),
    Family("GPT-OSS", "gpt_oss"),
    Family("OLMo", "olmo"),
    Family("OLMo 2", "olmo2"),
    Family("OLMo 3", "olmo3", {"layer_types": _WINDOWED}),
    Family("OLMo hybrid", "olmo_hybrid", {"layer_types": _MIXED}),
    Family("OLMoE", "olmoe"),
    Family("FlexOLMo", "flex_olmo"),
    Family("SmolLM3", "smollm3"),
    Family("GLM 4", "glm4"),
    Family("GLM 4-MoE", "glm4_moe", {"head_dim": 32}),  # published, too, and read by vLLM
    Family("GLM 4.7-Flash", "glm4_moe_lite", {**_LATENT, "first_k_dense_replace": 1}),  # published, too
    Family("Granite", "granite", {"logits_scaling": 8.0}),
    Family("Granite-MoE", "granitemoe", {"logits_scaling": 6.0}),
    Family(
        "Granite 4 (hybrid)", "granitemoehybrid", {"layer_types": ["mamba", "attention"] * 2, "logits_scaling": 6.0}
    ),
    Family("DeepSeek-V2", "deepseek_v2", _LATENT),
    # Published models name how they choose experts. transformers knows one way only, and vLLM reads it.
    Family("DeepSeek-V3, Kimi-K2", "deepseek_v3", {**_LATENT, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
    Family(
        "Kimi-Linear", "kimi_linear", {**_LATENT, "linear_head_dim": 16, "linear_num_heads": 4, "layer_types": _MIXED}
    ),
    Family(
        "LongCat-Flash",
        "longcat_flash",
        {
            **_LATENT,
            "head_dim": 8,
            "num_layers": 2,
            "ffn_hidden_size": 64,
            "expert_ffn_hidden_size": 32,
            "zero_expert_num": 2,
            "moe_topk": 2,
        },
    ),
    Family("Youtu", "youtu", _LATENT),
    Family("MiniCPM3", "minicpm3", _LATENT),
    Family("Cohere", "cohere", {"logit_scale": 3.0}),
    Family("Cohere 2", "cohere2", {"layer_types": _WINDOWED, "logit_scale": 3.0}),
    Family(
        "Cohere 2, within a window",
        "cohere2",
        {"layer_types": _WINDOWED, "logit_scale": 3.0, "sliding_window": 256},
    ),
    # Published models name both widths in config.json. transformers does not read them, vLLM does.
    Family("LFM2", "lfm2", {"layer_types": ["conv", "full_attention"] * 2, "block_dim": 64, "conv_dim": 64}),
    Family("LFM2-MoE", "lfm2_moe", {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1}),
    Family("Mamba", "mamba"),
    Family("Mamba 2", "mamba2", {"num_heads": 8, "expand": 2}),
    Family("Falcon-Mamba", "falcon_mamba"),
    Family("Bamba", "bamba", {"attn_layer_indices": [1, 3]}),
    Family(
        "Jamba",
        "jamba",
        {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    ),
    Family("Falcon-H1", "falcon_h1", {"mamba_d_ssm": 128, "lm_head_multiplier": 0.5}),
    Family("Nemotron", "nemotron"),
    Family("Nemotron-H", "nemotron_h"),
    Family(
        "Zamba 2",
        "zamba2",
        {
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "n_mamba_heads": 8,
            "use_mamba_kernels": False,
            # The shared attention reads its input twice as wide, so with four heads one has 32 numbers.
            **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32},
        },
    ),
    Family("GPT-NeoX, Pythia", "gpt_neox"),
    Family("GPT-2", "gpt2", {"n_inner": None}),
    Family("GPT-BigCode", "gpt_bigcode", {"num_key_value_heads": 1}),
    Family("GPT-Neo", "gpt_neo", {"attention_types": [[["global", "local"], 2]]}),
    Family("GPT-J", "gptj", {"rotary_dim": 8, "n_inner": None}),
    Family("Bloom", "bloom"),
    Family("MPT", "mpt", {"max_seq_len": 256}),
    Family("OPT", "opt", {"word_embed_proj_dim": 64}),
    Family("Falcon", "falcon"),
    Family("StableLM", "stablelm"),
    Family("StarCoder2", "starcoder2"),
    Family("Arcee", "arcee"),
    Family("Apertus", "apertus"),
    Family("EXAONE 4", "exaone4", {"layer_types": _WINDOWED}),
    Family("Seed-OSS", "seed_oss"),
    Family("ERNIE 4.5", "ernie4_5"),
    Family("ERNIE 4.5-MoE", "ernie4_5_moe"),
    Family("HunYuan (dense)", "hunyuan_v1_dense"),
    Family("HunYuan (MoE)", "hunyuan_v1_moe"),
    Family("HyperCLOVA X", "hyperclovax"),
    Family("MiniMax", "minimax"),
    # Published models name all three. transformers reads the first for its rotation alone.
    Family("MiniMax M2", "minimax_m2", {"rotary_dim": 8, "scoring_func": "sigmoid", "use_routing_bias": True}),
    Family(
        "MiMo-V2-Flash",
        "mimo_v2_flash",
        {  # Published models have another name for much that transformers reads, and vLLM reads those.
            **{"hybrid_layer_pattern": [0, 1, 1, 1], "moe_layer_freq": [0, 1, 1, 1], "layernorm_epsilon": 1e-5},
            **{"sliding_window_size": 8, "swa_head_dim": 16},
            **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4},
        },
    ),
    Family("BitNet", "bitnet"),
    Family("Helium", "helium"),
    Family("nanochat", "nanochat"),
    Family("Persimmon", "persimmon"),
    Family("RecurrentGemma", "recurrent_gemma"),
    Family("RWKV", "rwkv", {"attention_hidden_size": 64}),
)
