"""The servers of a run on Ray, checked before any work. Ray is imported only where they are wanted."""

from importlib.util import find_spec
from pathlib import Path

from dspy_fst.engine.options import make_settings
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.policy_lm import PolicyLM


def wants_servers_on_ray(policy: PolicyLM) -> bool:
    """Whether the policy's servers are launched on a Ray cluster."""
    return policy.handle.resolved_kind == "vllm" and bool(policy.handle.options.get("on_ray"))


def servers_on_ray(policy: PolicyLM) -> int:
    """How many servers the policy has on a Ray cluster; each holds a CPU of it."""
    return make_settings(VLLMSettings, policy.handle.options, "vllm").servers if wants_servers_on_ray(policy) else 0


def servers_on_ray_faults(policy: PolicyLM, run_dir: Path, *, lora: bool) -> list[str]:
    """What the cluster that this process is connected to lacks for the servers; empty where none are wanted there.

    Args:
        policy: The student's.
        run_dir: Where the weights will lie.
        lora: Whether LoRA adapters are trained, so that the servers read the model's own folder, too.
    """
    if not wants_servers_on_ray(policy):
        return []
    if find_spec("ray") is None:
        return ["engine_options: on_ray needs Ray, which is not installed: pip install 'dspy-fst[ray]'"]
    from dspy_fst.engine.vllm.on_ray.room import room_faults

    settings, model = make_settings(VLLMSettings, policy.handle.options, "vllm"), policy.checkpoint.path
    return [f"engine_options: {fault}" for fault in room_faults(settings, run_dir, model if lora else None)]
