"""Trainer ranks as actors of a Ray cluster: what torchrun does for a run, without a launcher on each machine.

The contract of this file:

- This process is rank 0. Each other rank is an actor in a bundle of one placement group, and does what a process does
  that torchrun started.
- When the block begins, every rank has a place, sees the folders and has imported the trainer. Else nothing has begun.
- A rank that fails or dies ends the block, also while this process searches, and is named.
- The actors end with the block, and with this process.
"""

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dspy_fst.engine.machine import Launch
from dspy_fst.engine.vllm.on_ray.nodes import node_name
from dspy_fst.engine.vllm.on_ray.places import bundle, end_reservation, in_words
from dspy_fst.engine.vllm.on_ray.room import Wanted, seen_here, unseen
from dspy_fst.errors import ClusterError, ConfigurationError, briefly
from dspy_fst.run.interrupts import terminate_run, terminated_again
from dspy_fst.slow.ranks.launcher import Launcher
from dspy_fst.slow.ranks.ranks import Ranks
from dspy_fst.slow.ranks.roles import obey

logger = logging.getLogger(__name__)

READY_S = 300.0
"""How long the ranks may take to find a place and to import the trainer, from a disk that may be slow (ours)."""
ANSWER_S = 10.0
"""How long a rank tries to reach rank 0 (ours); torch tries for half an hour."""
END_S = 5.0
"""How long a rank may take to end once the run is over; then it is killed (ours)."""


class RankActor:
    """Another rank than 0, in a process that has torchrun's variables and has imported the trainer with this file."""

    @ray.method
    def ready(self, wanted: Wanted) -> tuple[str, list[str]]:
        """This rank in words, and what hinders it, as ends of sentences."""
        node = node_name(ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id())
        name = f"rank {os.environ['RANK']} (process {os.getpid()} on {node})"
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection((host, port), timeout=ANSWER_S).close()
        except OSError as error:
            return name, [f"does not reach rank 0 at {host}:{port} ({briefly(error)}): open ports between the nodes"]
        return name, unseen(wanted)

    @ray.method
    def obey(self) -> None:
        """Make the calls that rank 0 makes of its trainer, to the end of the run. This process ends with it."""
        try:
            obey(Launch.of())
        except Exception:
            # An actor outlives its method's error, and gloo's connections with it: rank 0 would wait at them.
            logger.exception("rank %s failed", os.environ["RANK"])
            sys.stderr.flush()
            os._exit(1)


@contextmanager
def ranks_on_ray(count: int, run_dir: Path, model: Path) -> Iterator[Ranks]:
    """The block in which this process, which is connected to a cluster, is rank 0 of so many.

    Args:
        count: Of all ranks, two at least.
        run_dir: Where weights and states will lie.
        model: Folder of the weights at the start.

    Raises:
        ConfigurationError: a rank does not see the folders, or does not reach this process.
        ClusterError: the cluster has no place for a rank in time, or one could not start.
        RankError: a rank failed or died.
    """
    launcher = Launcher(ray.util.get_node_ip_address(), count)
    over, lost = threading.Event(), list[str]()
    with ExitStack() as stack:
        actors = _placed(stack, launcher, count)
        names = _ready(actors, run_dir, model)
        ended = [cast("ObjectRef[None]", actor.obey.remote()) for actor in actors]
        stack.callback(ray.wait, ended, num_returns=len(ended), timeout=END_S)
        for end, name in zip(ended, names, strict=True):
            end.future().add_done_callback(partial(_ended, name, over, lost))
        stack.callback(launcher.give_up)
        stack.callback(over.set)  # where they do not meet
        ranks = stack.enter_context(launcher.leading(lost))
        stack.callback(over.set)  # before they are told that it is
        stack.enter_context(terminated_again())
        yield ranks


def _placed(stack: ExitStack, launcher: Launcher, count: int) -> list[ActorHandle[RankActor]]:
    """An actor for each other rank, as near to each other as they fit: gradients go from each to each."""
    need = dict(bundle(cards=1))
    group = placement_group([need] * (count - 1), strategy="PACK")
    stack.callback(end_reservation, group)
    # Releases of Ray differ in whether they hide a machine's cards from who asked for none.
    others = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | ({} if "GPU" in need else {"CUDA_VISIBLE_DEVICES": ""})
    kind, actors = ray.remote(RankActor), []
    for rank in range(1, count):
        placed = PlacementGroupSchedulingStrategy(group, rank - 1)
        options = {"num_cpus": need["CPU"], "num_gpus": need.get("GPU", 0), "scheduling_strategy": placed}
        environment = {"env_vars": {**launcher.variables(rank), **others}}
        actors.append(cast(ActorHandle[RankActor], kind.options(**options, runtime_env=environment).remote()))
    return actors


def _ready(actors: Sequence[ActorHandle[RankActor]], run_dir: Path, model: Path) -> list[str]:
    """The names of the ranks, once each has a place, and all that it needs there.

    Raises:
        ClusterError: one has no place in time, or did not start.
        ConfigurationError: one lacks something.
    """
    try:
        with seen_here(run_dir, model) as wanted:
            told: list[tuple[str, list[str]]] = ray.get([one.ready.remote(wanted) for one in actors], timeout=READY_S)
    except GetTimeoutError:
        raise ClusterError(
            f"ranks: Ray did not start {len(actors)} with {in_words(bundle(cards=1))} each within {READY_S:g} s, and "
            f"has {in_words(ray.available_resources())} free. Wait for the jobs that hold the rest (`ray status`), add "
            "nodes, or lower ranks"
        ) from None
    except RayError as error:
        why = error.cause if isinstance(error, RayTaskError) else error
        raise ClusterError(
            f"ranks: one did not start on Ray: {briefly(why)}. Each node needs the same dspy-fst, Python and torch, "
            "and the memory of a trainer"
        ) from error
    if faults := [f"{name} {fault}" for name, own in told for fault in own]:
        raise ConfigurationError(faults)
    return [name for name, _ in told]


def _ended(name: str, over: threading.Event, lost: list[str], end: "Future[None]") -> None:
    """What Ray calls when a rank is gone. Before the run is over that ends the run, which finds out who was first."""
    if over.is_set():
        return
    error = end.exception()
    lost.append(f"{name} is lost: {briefly(error) if error else 'it ended'}")
    logger.error(lost[-1])
    terminate_run()
