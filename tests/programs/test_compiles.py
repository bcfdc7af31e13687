"""Each program through compile() on a small base of its own, in process and on two vLLM servers that all share."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_fst import PolicyLM
from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.vllm.server import VLLMServer
from dspy_fst.rollout.components import read_texts
from programs import codeio, hover, math, physics, reckon, relay, star_graph
from programs.common import Task
from programs.lab import BASE as LAB
from programs.tiny import PAPER, RECKON
from programs.tiny.courses import GRAPH
from tests.engine.tiny_qwen import small
from tests.pipelines.watched import Watched, assert_tokens_are_exact, run_watched, tokens_of

SMALL = {"train": 24, "val": 4, "test": 1, "seed": 5}
PROBLEMS = 6
"""Of the one step."""


@dataclass(frozen=True)
class Case:
    """A program and what is trained of it."""

    build: Callable[[], Task]
    trained: frozenset[str]
    base: Path = PAPER
    calls: int = 1
    """Of the policy, in one rollout."""


def with_a_frozen_judge() -> Task:
    """HoVer with another LM in the judge's place, which is not the policy's to train."""
    task = hover.build(**SMALL, split="short", kept=2)
    task.program.judge.lm = dspy.utils.DummyLM([{"verdict": "supported"}] * 1000)
    return task


HOVER = frozenset({"first_query", "summarize", "next_query", "judge"})
CASES = {
    "star_graph": Case(lambda: star_graph.build(**SMALL, **GRAPH), frozenset({"find"})),
    "codeio": Case(lambda: codeio.build(**SMALL), frozenset({"predict.predict"})),
    "math": Case(lambda: math.build(**SMALL), frozenset({"solve.predict"})),
    "physics": Case(lambda: physics.build(**SMALL), frozenset({"choose.predict"})),
    "hover": Case(lambda: hover.build(**SMALL, split="short", kept=2), HOVER, calls=5),
    "hover, frozen judge": Case(with_a_frozen_judge, HOVER - {"judge"}, calls=4),
    "reckon": Case(lambda: reckon.build(**SMALL), frozenset({"plan", "report"}), RECKON, calls=2),
    "relay": Case(lambda: relay.build(**SMALL), frozenset({"first", "second"}), LAB, calls=2),
}


@contextmanager
def serving(base: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """A server that many runs from a base may share: each puts its own weights on it. Says how to reach it."""
    engine = VLLMServer(small(folder / "vllm.log"))
    engine.load(Checkpoint("base", base))
    assert engine.address is not None
    try:
        yield {"attach_url": engine.address.url, "api_key": engine.address.api_key}
    finally:
        engine.close()


@pytest.fixture(scope="module")
def paper_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Started once for all programs of the paper."""
    with serving(PAPER, tmp_path_factory.mktemp("log")) as address:
        yield address


def told_apart(metric: Callable[..., Any]) -> Callable[..., dspy.Prediction]:
    """The program's metric with a little on top for short predictions: a small base is right so seldom that a group of
    eight may be flat, and would teach nothing."""

    def judged(gold: Any, pred: Any, *rest: Any, **named: Any) -> dspy.Prediction:
        told = metric(gold, pred, *rest, **named)
        return dspy.Prediction(score=told.score + 1 / (100 + len(str(pred))), feedback=told.feedback)

    return judged


def compiled(case: Case, task: Task, policy: PolicyLM, run_dir: Path) -> Watched:
    """One cycle of one search and one step, the frozen LMs left as they are."""
    for _, predictor in task.program.named_predictors():
        predictor.lm = predictor.lm or policy
    return run_watched(
        task.program,
        run_dir,
        metric=told_apart(task.metric),
        trainset=task.trainset,
        problems_per_step=PROBLEMS,
        anchors=4,
        search_rollouts=16,
        group_size=8,
    )


def assert_compiled(case: Case, task: Task, run: Watched) -> None:
    """Texts of all trained predictors were tried, their calls and no others learn, on the tokens that were sampled."""
    seed = read_texts(task.program).texts
    played = [rollout.candidate.texts for _, rollout in run.rollouts]
    for name in case.trained:
        assert any(texts[name] != seed[name] for texts in played), f"the instruction of {name} never changed"
    rollouts = run.played("step")
    assert len(rollouts) == 8 * PROBLEMS
    rewards: dict[int, set[float | None]] = {}
    for rollout in rollouts:
        rewards.setdefault(rollout.problem, set()).add(rollout.reward)
        assert rollout.failure or len(rollout.calls) == case.calls
    learnt = [call for rollout in rollouts if len(rewards[rollout.problem]) > 1 for call in rollout.calls]
    assert {call.predictor for call in learnt} == case.trained
    assert Counter(map(tokens_of, run.rows)) == Counter(map(tokens_of, learnt))
    for name in case.trained:
        assert any(abs(row.advantage * row.token_weight) > 0 for row in run.rows if row.predictor == name)
    assert_tokens_are_exact(run)
    (step,) = run.reports("step")
    assert step["update"]["grad_norm"] > 0
    assert step["update"]["rows"] == len(run.rows)


@pytest.mark.parametrize("name", CASES)
def test_a_program_s_texts_and_weights_learn_in_process(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    task = case.build()
    policy = PolicyLM(case.base, engine="in_process", max_tokens=64, engine_options={"linger_s": 60.0})
    assert_compiled(case, task, compiled(case, task, policy, tmp_path / "run"))


def assert_compiles_on(server: dict[str, Any], case: Case, run_dir: Path) -> None:
    task = case.build()
    policy = PolicyLM(case.base, engine="vllm", max_tokens=64, engine_options=server)
    assert_compiled(case, task, compiled(case, task, policy, run_dir))


@pytest.mark.vllm
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].base == PAPER])
def test_a_program_of_the_paper_learns_on_vllm(name: str, paper_server: dict[str, Any], tmp_path: Path) -> None:
    assert_compiles_on(paper_server, CASES[name], tmp_path / "run")


@pytest.mark.vllm
def test_a_program_with_a_tool_learns_on_vllm(tmp_path: Path) -> None:
    with serving(RECKON, tmp_path) as server:  # relay's like is in tests/test_survival.py
        assert_compiles_on(server, CASES["reckon"], tmp_path / "run")
