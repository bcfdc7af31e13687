"""The nodes of the Ray cluster that this process is connected to, and what each finds wrong with itself."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import ray
from ray import ObjectRef
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dspy_fst.errors import briefly

logger = logging.getLogger(__name__)


def node_name(address: str, node_id: str) -> str:
    """A node as a user tells it from others: several on one machine have one address.

    >>> node_name("10.0.0.7", "3f2a91c4d5e6")
    'Ray node 10.0.0.7 (3f2a91c4)'
    """
    return f"Ray node {address} ({node_id[:8]})"


@dataclass(frozen=True)
class RayNode:
    """A node of the cluster."""

    number: str
    """Ray's, in hexadecimal digits."""
    name: str
    resources: Mapping[str, float]
    """All that it has, e.g. ``{"CPU": 8.0, "GPU": 2.0}``, whoever uses it."""


def nodes_alive() -> list[RayNode]:
    """Those that are alive."""
    return [
        RayNode(entry["NodeID"], node_name(entry["NodeManagerAddress"], entry["NodeID"]), entry["Resources"])
        for entry in ray.nodes()
        if entry["Alive"]
    ]


def node_faults(
    nodes: Sequence[RayNode], what: str, task: Callable[..., list[str]], *arguments: object, limit_s: float
) -> list[str]:
    """What a task finds wrong on each node, one sentence for each fault. It runs there beside whatever else does.

    Args:
        what: What the task does, e.g. "read the program".
        task: Gives ends of sentences about its node.
        *arguments: Of the task.
        limit_s: How long the nodes may take, all at once.
    """
    remote = ray.remote(num_cpus=0, max_retries=0)(task)
    on = [remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.number, soft=False)) for node in nodes]
    asked = [there.remote(*arguments) for there in on]
    if asked:
        ray.wait(asked, num_returns=len(asked), timeout=limit_s)
    said = [_said(node, what, answer, limit_s) for node, answer in zip(nodes, asked, strict=True)]
    return [f"{node.name} {fault}" for node, faults in zip(nodes, said, strict=True) for fault in faults]


def _said(node: RayNode, what: str, answer: "ObjectRef[list[str]]", limit_s: float) -> list[str]:
    """A node's answer, or why there is none."""
    try:
        return ray.get(answer, timeout=0)
    except GetTimeoutError:
        return [f"did not {what} within {limit_s:g} s"]
    except RayError as error:
        why = briefly(error.cause if isinstance(error, RayTaskError) else error)
        if node.number not in {alive.number for alive in nodes_alive()}:  # no fault of the run
            logger.warning("%s was lost at the start: %s", node.name, why)
            return []
        return [f"cannot {what}: {why}. Have the same packages, and the program's code at the same path, on every node"]
