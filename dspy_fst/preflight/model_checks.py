"""The model: its files, its kind, its chat template, and whether prompts leave room for a reply."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dspy_fst.config import FSTConfig
from dspy_fst.engine.machine import has_gpu
from dspy_fst.engine.vllm.server_settings import DROPS_WEIGHTS, NO_LORA
from dspy_fst.errors import TrainingError, briefly
from dspy_fst.fast.search_settings import MOST_DEMO_TOKENS
from dspy_fst.model_files.architectures import context_length, empty_model, has_experts, kind_faults, unreadable
from dspy_fst.model_files.folder import adapter_fault, folder_faults, stored_layer_fault, stored_shapes
from dspy_fst.model_files.hub import hub_fault, in_cache, means_a_path, read_from
from dspy_fst.model_files.reach import ANSWER_S
from dspy_fst.model_files.reading import read_config, read_tokenizer
from dspy_fst.outcomes.outcome import CONTEXT
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.preflight.template_checks import template_faults
from dspy_fst.preflight.vllm_start import vllm_faults
from dspy_fst.recipe.lora_settings import Grouping, LoRA
from dspy_fst.run.files import read_json
from dspy_fst.types import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


CONTEXT_PART = 4
"""Demos take one part in so many of the context, unless the user says how many tokens (ours)."""


def model_faults(policy: PolicyLM, hub_s: float = ANSWER_S) -> list[str]:
    """Faults of the model's files, found without loading weights. A hub has ``hub_s`` seconds to answer."""
    path, where = policy.checkpoint.path, f"model={policy.model!r}"
    if not path.is_dir() and means_a_path(policy.model):
        return [f"{where}: there is no such folder; name a Hugging Face folder or a hub model"]
    if not path.is_dir() and (fault := hub_fault(str(path), hub_s)):
        return [f"{where}: {fault}"]
    if fault := adapter_fault(path):
        return [f"{where}: {fault}"]
    files = path if path.is_dir() else read_from(str(path), hub_s)
    try:
        config = read_config(files)
    except Exception as error:  # foreign files may break in any way
        return [f"{where}: {unreadable(path, error)}"]
    faults = [f"{where}: {fault}" for fault in (*_kind_faults(policy, config), *_weights_faults(path))]
    if path.is_dir() and not faults and (fault := stored_layer_fault(path)):
        faults.append(f"{where}: {fault}")
    try:
        tokenizer = read_tokenizer(files)
    except Exception as error:
        faults.append(f"{where}: its tokenizer cannot be read: {briefly(error)}")
    else:
        faults += [f"{where}: {fault}" for fault in template_faults(tokenizer)]
    limit, longest = _context_limit(policy, config), policy.reply_limit
    if limit and isinstance(longest, int) and longest >= limit:
        faults.append(
            f"max_tokens={longest}: the context of {limit} tokens leaves no room for a prompt; "
            "lower PolicyLM(max_tokens=...)"
        )
    return faults


def _kind_faults(policy: PolicyLM, config: "PreTrainedConfig") -> Iterator[str]:
    """Models that transformers can load and that generate no text, or that trainer or engine do not support."""
    yield from kind_faults(config)
    if policy.handle.resolved_kind == "vllm":
        yield from vllm_faults(config, policy.handle.options, on_gpu=has_gpu())


def _weights_faults(path: Path) -> Iterator[str]:
    if not path.is_dir():
        return
    try:
        if not stored_shapes(path) and not any(path.glob("*.bin")):
            yield "the folder holds no weights (model.safetensors); copy or download the model again"
    except ValueError as error:
        yield f"its weights cannot be read ({error}); copy or download the model again"
    yield from folder_faults(path)


def lora_faults(policy: PolicyLM, adapter: LoRA, grouping: Grouping = "shared") -> list[str]:
    """Why these LoRA adapters do not fit the engine's options, or the model, from its config alone. A model that cannot
    be read is reported by `model_faults`."""
    from dspy_fst.engine.lora import peft_fault
    from dspy_fst.engine.lora_layers import name_faults, target_faults

    faults = name_faults(grouping if isinstance(grouping, dict) else ())
    if policy.handle.options.get("sleep_level") == DROPS_WEIGHTS:
        faults.append(
            "engine_options: sleep_level=2 drops the base below the LoRA adapters, and an update hands the adapters "
            "alone over; use sleep_level=1"
        )
    if (way := policy.handle.options.get("weight_transfer", "disk")) != "disk":
        faults.append(f"engine_options: {NO_LORA.format(way=way)}")
    model = _without_numbers(policy)
    if model is None:
        return faults
    if unfit := target_faults(model, adapter):
        return [*faults, *unfit]
    faults += _other_settings(policy, model, adapter)
    return faults if (fault := peft_fault(model, adapter)) is None else [*faults, fault]


def _other_settings(policy: PolicyLM, model: "PreTrainedModel", adapter: LoRA) -> Iterator[str]:
    """A sentence if the student's LoRA adapters are several, and would not go on because of their settings."""
    from dspy_fst.engine.lora import goes_on, read

    held = policy.checkpoint.adapters
    if len(held) < 2:
        return
    try:
        if all(goes_on(model, each.path, adapter) for each in held):
            return
        found, _ = read(held[0].path)
    except TrainingError as error:
        yield f"model={policy.model!r}: {error}"
        return
    scaling = "alpha / sqrt(rank)" if found.rslora else "alpha / rank"
    yield (
        f"adapter: the student speaks through several LoRA adapters of rank={found.rank}, alpha={found.alpha:g}, "
        f"scaling {scaling} and {len(found.target)} layers, which cannot be merged into one set of weights; go on with "
        "the same rank, alpha, rslora and target"
    )


def lora_warnings(policy: PolicyLM, adapter: LoRA | None) -> list[str]:
    """A sentence for a mixture of experts: peft's adapters for fused experts would adapt their router, too."""
    model = None if adapter is None else _without_numbers(policy)
    if model is None or not has_experts(model.config):
        return []
    return [
        f"adapter: the experts of a {model.config.model_type!r} model that transformers holds in one tensor, and their "
        "routers, get no LoRA adapter; attention and other linear layers do"
    ]


def _without_numbers(policy: PolicyLM) -> "PreTrainedModel | None":
    """The policy's model on the meta device; None where its config cannot be read, or transformers cannot build it."""
    config = _config_of(policy)
    try:
        return None if config is None else empty_model(config)
    except Exception:  # a model's own code may break in any way
        return None


def _config_of(policy: PolicyLM) -> "PreTrainedConfig | None":
    """The model's config; None where it cannot be read: `model_faults` has told so, or the model is imagined."""
    path = policy.checkpoint.path
    if not path.is_dir() and in_cache(str(path)) == "not":
        return None
    files = path if path.is_dir() else read_from(str(path))
    try:
        return read_config(files)
    except Exception:  # foreign files may break in any way
        return None


def _context_limit(policy: PolicyLM, config: "PreTrainedConfig") -> int | None:
    """Longest prompt plus reply in tokens: the server's ``max_model_len``, else the model's own limit."""
    limit = policy.handle.options.get("max_model_len")
    if isinstance(limit, int) and limit > 0:
        return limit
    return context_length(config)


def with_demo_tokens(config: FSTConfig, policy: PolicyLM, run_dir: Path) -> FSTConfig:
    """The recipe with the number that ``max_demo_tokens=None`` means, where demos evolve: the one that the run in
    ``run_dir`` began with, else the model's. Earlier releases began with their default, 1000."""
    if config.max_demo_tokens is not None or not config.demos_evolve:
        return config
    recipe = read_json(run_dir / "recipe.json")
    recorded = recipe.get("max_demo_tokens") if isinstance(recipe, Mapping) else None
    if isinstance(recorded, int) and recorded >= 1:
        return config.model_copy(update={"max_demo_tokens": recorded})
    files = _config_of(policy)
    limit = None if files is None else _context_limit(policy, files)
    fitting = MOST_DEMO_TOKENS if limit is None else max(1, (limit - (policy.reply_limit or 0)) // CONTEXT_PART)
    return config.model_copy(update={"max_demo_tokens": min(MOST_DEMO_TOKENS, fitting)})


def context_faults(policy: PolicyLM, rollouts: Sequence[Rollout], demo_tokens: int = 0) -> list[str]:
    """A sentence when the prompts of the first examples leave no room for ``max_tokens`` in the model's context.

    Args:
        demo_tokens: What the demos that a search adds may take of the context; 0: it adds none.
    """
    config = read_config(policy.checkpoint.path)
    limit = _context_limit(policy, config)
    reply = policy.reply_limit or 0
    longest = max((len(call.prompt_ids) for rollout in rollouts for call in rollout.calls), default=0)
    overflow = any(rollout.failure == CONTEXT for rollout in rollouts)
    if limit is not None and demo_tokens and not overflow and longest + reply <= limit < longest + reply + demo_tokens:
        return [
            f"max_demo_tokens={demo_tokens}: a prompt of the first examples has {longest} tokens, and with a reply of "
            f"max_tokens={reply} and such demos it does not fit the context of {limit}; use max_demo_tokens="
            f"{limit - longest - reply} or fewer, or raise max_model_len"
        ]
    if limit is None or not (overflow or longest + reply > limit):
        return []
    shown = f"over {limit}" if overflow else str(longest)
    return [
        f"max_tokens={reply}: a prompt of the first examples has {shown} tokens, and with the reply it does not fit "
        f"the context of {limit}; lower PolicyLM(max_tokens=...), shorten the prompt, or raise max_model_len"
    ]
