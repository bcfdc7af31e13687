"""The processes of a run on Ray, checked before any work. Ray is imported only where they are wanted."""

from importlib.util import find_spec
from pathlib import Path

from dspy_fst.config import FSTConfig
from dspy_fst.engine.options import make_settings
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.policy_lm import PolicyLM


def wants_servers_on_ray(policy: PolicyLM) -> bool:
    """Whether the policy's servers are launched on a Ray cluster."""
    return policy.handle.resolved_kind == "vllm" and bool(policy.handle.options.get("on_ray"))


def servers_on_ray(policy: PolicyLM) -> int:
    """How many servers the policy has on a Ray cluster; each holds a CPU of it."""
    return make_settings(VLLMSettings, policy.handle.options, "vllm").servers if wants_servers_on_ray(policy) else 0


def room_faults(policy: PolicyLM, config: FSTConfig, run_dir: Path) -> list[str]:
    """What the cluster that this process is connected to lacks for a run's servers and ranks; empty where none are
    wanted there.

    Args:
        policy: The student's.
        config: With LoRA adapters the servers read the model's own folder, too.
        run_dir: Where the weights will lie.
    """
    on_ray = wants_servers_on_ray(policy)
    if not on_ray and config.ranks == 1:
        return []
    if find_spec("ray") is None:
        wanting = "engine_options: on_ray" if on_ray else "ranks"
        return [f"{wanting} needs Ray, which is not installed: pip install 'dspy-fst[ray]'"]
    from dspy_fst.engine.vllm.on_ray import room
    from dspy_fst.engine.vllm.on_ray.places import bundle

    ranks = [room.Claim("ranks", config.ranks, config.ranks - 1, bundle(cards=1))] if config.ranks > 1 else []
    if not on_ray:
        return room.too_little(ranks)
    settings, model = make_settings(VLLMSettings, policy.handle.options, "vllm"), policy.checkpoint.path
    return room.room_faults(settings, run_dir, model if config.adapter is not None else None, ranks)
