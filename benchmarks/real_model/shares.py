"""How many replies of a model parse, by adapter and demos."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dspy

from dspy_fst import PolicyLM
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.types import Problem, Rollout
from programs.smollm2 import moods

ADAPTERS: dict[str, Callable[[], Any]] = {
    "ChatAdapter": dspy.ChatAdapter,
    "JSONAdapter": dspy.JSONAdapter,
    "XMLAdapter": dspy.XMLAdapter,
}
THREADS = 16


@dataclass(frozen=True)
class Share:
    """What came back under one adapter with so many demos."""

    adapter: str
    demos: int
    replies: int
    parsed: float
    """Share of the replies."""
    reward: float
    """Mean; 0 for a reply that does not parse."""


def play(policy: PolicyLM, adapter: str, demos: int, replies: int, draw: str = "shares") -> list[Rollout]:
    """Replies of the policy to the moods task, one problem after the other, at its own temperature."""
    task = moods.build(demos=demos)
    task.program.set_lm(policy)
    problems = [Problem(index, example) for index, example in enumerate(task.trainset)]
    texts = read_texts(task.program)
    tasks = [Task(problems[i % len(problems)], texts, i // len(problems)) for i in range(replies)]
    with dspy.context(adapter=ADAPTERS[adapter]()):
        engine = policy.handle.ready()
        rollouter = Rollouter(task.program, Reward(task.metric), RolloutSettings(num_threads=THREADS), engine.expect)
        return rollouter.rollout(tasks, draw)


def share(policy: PolicyLM, adapter: str, demos: int, replies: int) -> Share:
    """One line of the table."""
    rollouts = play(policy, adapter, demos, replies)
    parsed = sum(rollout.failure is None and rollout.mask is None for rollout in rollouts)
    rewards = [rollout.reward or 0.0 for rollout in rollouts]
    return Share(adapter, demos, replies, parsed / replies, sum(rewards) / replies)
