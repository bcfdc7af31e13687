"""Names that other trainers have for what is meant here: trl 1.16, verl and Tinker (docs/losses.md), peft and DSPy.

A name that nobody here has is refused anyway. Without this table a user would look for its counterpart by hand, and
`difflib` would find some other name that is spelt alike.
"""

_LOSS = "use loss=..., e.g. 'dapo'; docs/losses.md says which name means what"
_CLIP = "use clip=(0.2, 0.28), or importance_cap=4.0 under loss='cispo'"
_DIVISOR = "use advantage_normalization='group' or 'batch', or loss='dr_grpo', which divides by none"
_KL = "use kl_coefficient; the KL is exact over the vocabulary"
_LORA = "use adapter='lora', or LoRA(rank=...)"
_TOKENS = "use max_tokens of the PolicyLM"
_ENGINE = "use engine='vllm' or 'in_process' of the PolicyLM, and its engine_options"
_BATCH = "use problems_per_step and group_size, and micro_batch_tokens for the memory of a forward pass"
_LENGTH = "use cycles and steps_per_cycle"
_TEACHER = "pass a program to compile(teacher=...); in a project file teacher stands above the recipe"

INSTEAD: dict[str, str] = {
    **dict.fromkeys(("loss_type", "loss_fn", "policy_loss", "loss_mode", "loss_agg_mode", "adv_estimator"), _LOSS),
    "importance_sampling_level": "use loss='gspo' for the ratios of whole sequences",
    **dict.fromkeys(("epsilon", "epsilon_high", "epsilon_low", "cliprange", "clip_range", "clip_ratio"), _CLIP),
    **dict.fromkeys(("clip_ratio_low", "clip_ratio_high", "clip_low_threshold", "clip_high_threshold"), _CLIP),
    **dict.fromkeys(("scale_rewards", "norm_adv_by_std_in_grpo"), _DIVISOR),
    **dict.fromkeys(("beta", "kl_coef", "init_kl_coef", "kl_loss_coef", "use_kl_loss", "kl_loss_type"), _KL),
    **dict.fromkeys(("lr", "actor_lr"), "use learning_rate"),
    "warmup_ratio": "use warmup_steps, a number of updates",
    "optim": "use optimizer='adamw' or 'adamw_8bit'",
    **dict.fromkeys(("lora", "use_lora", "use_peft", "peft_config", "lora_config", "lora_rank", "lora_r"), _LORA),
    "lora_alpha": "use adapter=LoRA(rank=..., ...)",
    "load_in_4bit": "use quantized_base='nf4' beside adapter='lora'",
    "load_in_8bit": "use quantized_base='int8' beside adapter='lora'",
    **dict.fromkeys(("bf16", "fp16"), "use precision='bfloat16' or 'float32'"),
    **dict.fromkeys(("fsdp", "fsdp_config"), "use sharding='fsdp', and launch several processes with torchrun"),
    **dict.fromkeys(("max_tokens", "max_completion_length", "max_new_tokens", "max_response_length"), _TOKENS),
    "temperature": "replies are sampled at the temperature of the PolicyLM",
    **dict.fromkeys(("use_vllm", "vllm_mode"), _ENGINE),
    "num_generations": "use group_size",
    **dict.fromkeys(("per_device_train_batch_size", "train_batch_size", "gradient_accumulation_steps"), _BATCH),
    **dict.fromkeys(("num_iterations", "ppo_epochs"), "use updates_per_batch, which shares out a batch's problems"),
    **dict.fromkeys(("num_train_epochs", "epochs", "max_steps", "num_train_steps", "total_epochs"), _LENGTH),
    **dict.fromkeys(("output_dir", "folder"), "use run_dir"),
    "report_to": "use track=..., e.g. track='wandb'",
    **dict.fromkeys(("teacher", "teacher_settings"), _TEACHER),
}
"""Name elsewhere -> what to do here."""
