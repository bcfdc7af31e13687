"""Rollouts on a Ray cluster whose policy is sampled by an attached vLLM server."""

import pytest

from dspy_fst.cluster.connecting import connected
from dspy_fst.cluster.ray_rollouter import RayRollouter
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Task
from dspy_fst.types import Problem
from tests.cluster.play import LAB, Held, Killer, Placed, policy

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_what_a_lost_node_played_is_sampled_again_on_the_same_server(cluster, lab_on_vllm, tmp_path):
    lm = policy("vllm", **lab_on_vllm.vllm)
    node = next(node for node in cluster.list_all_nodes() if not node.is_head())
    metric = Held(node.node_id, tmp_path)
    killer = Killer(cluster, node, metric)
    program, settings = Placed(lm), RolloutSettings(num_threads=4)
    tasks = [Task(Problem(i, example), read_texts(program)) for i, example in enumerate(LAB.trainset[:12])]
    with connected(cluster.address) as stack:
        reward = Reward(metric, None, LAB.trainset)
        there = RayRollouter(program, reward, settings, lambda count: None, seed=3, cluster=stack)
        before = there.rollout(tasks, "draw")
        killer.arm()
        after = there.rollout(tasks, "draw")
        lost = there.take_counts()
    lm.release()
    assert len({rollout.prediction.node for rollout in before if rollout.prediction}) == 2
    assert [rollout.problem for rollout in after] == list(range(12))
    assert [bool(rollout.calls and rollout.calls[0].completion_ids) for rollout in after] == [True] * 12
    assert {call.weights for rollout in [*before, *after] for call in rollout.calls} == {lm.checkpoint.version}
    assert [(name, count) for name, count in lost.items()] == [("lost to NodeDiedError", 2)]
