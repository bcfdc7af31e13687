"""What a run or a command is put together from: a trainable copy of the program, a population and a rollouter."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

import dspy

from dspy_fst.cluster.connecting import connected
from dspy_fst.config import FSTConfig
from dspy_fst.errors import ConfigurationError
from dspy_fst.policy_lm import PolicyLM, policy_of
from dspy_fst.preflight.ray_checks import room_faults, servers_on_ray, wants_servers_on_ray
from dspy_fst.rollout.components import carried_by
from dspy_fst.rollout.copying import copied
from dspy_fst.rollout.program_graph import all_speakers
from dspy_fst.rollout.reward import Metric, Reward
from dspy_fst.rollout.rollouter import Rollouter
from dspy_fst.run.files import population_from_json
from dspy_fst.run.state import StateFields
from dspy_fst.types import Candidate, Population


def new_run_dir() -> Path:
    return Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"


def trainable_copy(student: dspy.Module, policy: PolicyLM, adapters: Mapping[str, str] | None = None) -> dspy.Module:
    """A copy of the student in which every predictor of its PolicyLM speaks through ``policy``'s engine.

    Each LM keeps its own temperature and limits, and stays one LM for the predictors of one LoRA adapter: BestOfN and
    Refine refuse a module of two.

    Args:
        adapters: Predictor -> its LoRA adapter; None: those of the policy's weights.
    """
    copy: dspy.Module = copied(student)
    through = policy.checkpoint.predictors if adapters is None else adapters
    names = {id(predictor): name for name, predictor in copy.named_predictors()}
    lms: dict[tuple[PolicyLM, str | None], PolicyLM] = {}
    for predictor in all_speakers(copy):  # also those that DSPy holds frozen, or misses
        if isinstance(lm := predictor.lm or dspy.settings.lm, PolicyLM):
            adapter = through.get(names.get(id(predictor), ""))
            key = lm, adapter
            predictor.lm = lms[key] if key in lms else lms.setdefault(key, lm.on(policy.handle, adapter))
    return copy


def starting_population(student: dspy.Module, seed: Candidate, size: int, state: StateFields) -> Population:
    """The run's committed population, else the compiled student's own, else copies of its texts."""
    if "population" in state:
        return population_from_json(state["population"])
    if carried := carried_by(student, seed):
        return Population((carried * size)[:size], (None,) * size)
    return Population.of_seed(seed, size)


@contextmanager
def cluster_of(config: FSTConfig, policy: PolicyLM, run_dir: Path) -> Iterator[ExitStack | None]:
    """The block in which a run is connected to its Ray cluster; None where it has none.

    The process stays connected where the policy's servers are on the cluster, as the compiled program asks them, too.

    Raises:
        ConfigurationError: the cluster lacks something for servers or ranks.
    """
    if config.ray is None:
        yield None
        return
    with connected(config.ray, stay=wants_servers_on_ray(policy)) as cluster:
        if faults := room_faults(policy, config, run_dir):
            raise ConfigurationError(faults)
        yield cluster


def open_rollouter(
    program: dspy.Module,
    metric: Metric,
    config: FSTConfig,
    in_flight: Callable[[int], None],
    peers: Sequence[dspy.Example] = (),
    cluster: ExitStack | None = None,
) -> Rollouter:
    """The rollouter of a run or a command.

    Args:
        peers: Examples of the program's (see Reward).
        cluster: What `cluster_of` gave.
    """
    reward = Reward(metric, frozenset(name for name, _ in program.named_predictors()), peers)
    if cluster is None:
        return Rollouter(program, reward, config, in_flight, seed=config.seed)
    from dspy_fst.cluster.ray_rollouter import RayRollouter  # imports Ray

    held = servers_on_ray(policy_of(program)) + config.ranks - 1
    return RayRollouter(program, reward, config, in_flight, seed=config.seed, cluster=cluster, held=held)
