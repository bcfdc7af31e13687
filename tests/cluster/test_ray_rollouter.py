"""Rollouts as tasks on a real Ray cluster of two nodes on this machine."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import dspy
import pytest
import ray

from dspy_fst import FSTOptimizer
from dspy_fst.cluster import ray_rollouter
from dspy_fst.cluster.connecting import connected, sigterm_as_before
from dspy_fst.cluster.policy_calls import PolicyCalls
from dspy_fst.cluster.ray_rollouter import RayRollouter
from dspy_fst.engine.vllm.on_ray.nodes import node_faults, nodes_alive
from dspy_fst.errors import ClusterError, ConfigurationError
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.run.directory import read_events
from dspy_fst.run.interrupts import Terminated, signals_raise
from dspy_fst.types import Call, Candidate, Problem, Rollout
from tests.cluster.conftest import NODE
from tests.cluster.play import (
    LAB,
    Ending,
    Held,
    Interrupting,
    Killer,
    Meeting,
    Placed,
    Stopping,
    Unread,
    policy,
    wait_for,
)
from tests.ranks.run import RECIPE
from tests.test_compile import propose

pytestmark = pytest.mark.slow
SETTINGS = RolloutSettings(num_threads=8, rollout_timeout_s=60)


# ---- a whole run -----------------------------------------------------------------------------------


def compiled(run_dir, metric, **changes):
    student = LAB.program.deepcopy()
    student.set_lm(policy())
    optimizer = FSTOptimizer(
        metric=metric, propose=propose, run_dir=run_dir, progress=False, num_threads=8, **RECIPE, **changes
    )
    done = optimizer.compile(student, trainset=LAB.trainset)
    done.predictors()[0].lm.release()
    return done


def test_a_run_that_loses_a_node_in_mid_step_ends_as_the_run_of_one_process(cluster, tmp_path):
    node = next(node for node in cluster.list_all_nodes() if not node.is_head())
    metric = Held(node.node_id, tmp_path)
    killer = Killer(cluster, node, metric)

    def arm(event):
        if event["event"] == "step" and not metric.armed.exists():
            killer.arm()

    mine = signal.getsignal(signal.SIGTERM)
    alone = compiled(tmp_path / "alone", metric)
    there = compiled(tmp_path / "there", metric, ray=cluster.address, listeners=[arm])
    killer.thread.join(30)
    assert not ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) is mine
    with sigterm_as_before():
        cluster.add_node(**NODE)
    assert there.population == alone.population
    steps = [
        [event["report"] for event in read_events(tmp_path / name) if event["event"] == "step"]
        for name in ("alone", "there")
    ]
    lost = [{name for name in step["counts"] if name.startswith("rollouts: lost to ")} for step in steps[1]]
    assert [len(names) for names in lost] == [0, 1, 0]
    for before, after, names in zip(*steps, lost, strict=True):
        assert {name: n for name, n in after["counts"].items() if name not in names} == before["counts"]
        assert after["group_rewards"] == before["group_rewards"]
        # Other calls share a batch of the engine, whose sums differ in their last bits.
        assert after["update"]["loss"] == pytest.approx(before["update"]["loss"], rel=1e-4)


def test_a_call_that_ends_after_the_run_begins_no_cluster(cluster):
    with connected(cluster.address) as stack:
        calls = PolicyCalls(stack, lambda count: None)
        calls._tell(0, b"in time")
        calls.close()
        assert not calls._taking.is_alive()
    calls._tell(0, b"late")
    assert not ray.is_initialized()


# ---- the rollouter ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def connection(cluster):
    """Shared by the tests of the rollouter. A run connects and disconnects by itself, so its test comes before."""
    with connected(cluster.address) as stack:
        yield stack


@pytest.fixture(scope="module")
def lm():
    made = policy()
    yield made
    made.release()


def on_cluster(program, connection, settings=SETTINGS, told=lambda count: None) -> RayRollouter:
    return RayRollouter(program, Reward(LAB.metric, None, LAB.trainset), settings, told, seed=3, cluster=connection)


def tasks_of(program, too_long: bool = False) -> list[Task]:
    longest = dspy.Example(numbers="1 " * 3000, answer="1").with_inputs("numbers")
    examples = [*LAB.trainset[:3], *([longest] if too_long else [])]
    own = read_texts(program)
    candidates = [own, Candidate({name: f"{text} Be brief." for name, text in own.texts.items()})]
    return [
        Task(Problem(i, example), candidate, sample)
        for i, example in enumerate(examples)
        for candidate in candidates
        for sample in range(2)
    ]


def without_logprobs(rollout: Rollout) -> list[Call]:
    return [replace(call, logprobs=()) for call in rollout.calls]


def logprobs_of(rollouts: Sequence[Rollout]) -> list[float]:
    return [value for rollout in rollouts for call in rollout.calls for value in call.logprobs]


def test_rollouts_on_two_nodes_are_those_of_one_process(connection, lm, tmp_path):
    program, counts = Meeting(lm, tmp_path), []
    tasks = tasks_of(program, too_long=True)

    def told(count):
        counts.append(count)
        lm.handle.engine.expect(count)

    alone = Rollouter(program, Reward(LAB.metric, None, LAB.trainset), SETTINGS, told, seed=3)
    there, seen = on_cluster(program, connection, told=told), []
    with dspy.context(lm=lm):
        expected = alone.rollout(tasks, "draw", anew=True)
        counts.clear()
        found = there.rollout(tasks, "draw", seen.append, anew=True)
    assert [without_logprobs(rollout) for rollout in found] == [without_logprobs(rollout) for rollout in expected]
    # Other calls share a batch of the engine, whose sums differ in their last bits.
    assert logprobs_of(found) == pytest.approx(logprobs_of(expected), rel=1e-4, abs=1e-5)
    assert [rollout.outcome for rollout in found] == [rollout.outcome for rollout in expected]
    assert [rollout.reward for rollout in found] == [rollout.reward for rollout in expected]
    assert {rollout.failure for rollout in found} >= {"context"}  # the engine's own error, across two processes
    assert all(rollout.candidate is task.candidate for rollout, task in zip(found, tasks, strict=True))
    assert sorted(map(id, seen)) == sorted(map(id, found))
    assert len({rollout.prediction.node for rollout in found if rollout.prediction}) == 2
    assert 4 < max(counts) <= 8  # more than one of the two workers has
    assert counts[-1] == 0
    answered = next(rollout for rollout in found if rollout.calls)
    assert answered.trace[0][0].lm.handle is lm.handle
    assert answered.asked[0].lm.handle is lm.handle
    assert there.take_counts() == {}


def test_a_node_that_cannot_read_the_program_is_named_before_anything_is_spent(connection, lm):
    with pytest.raises(ConfigurationError, match=r"cannot read the program: .*of_the_first_node") as caught:
        on_cluster(Unread(lm), connection)
    assert len(caught.value.faults) == 2


def test_a_node_that_does_not_answer_in_time_is_named(connection):
    slow = node_faults(nodes_alive(), "wake up", lambda: time.sleep(3), limit_s=0.1)
    assert [fault.partition(") ")[2] for fault in slow] == ["did not wake up within 0.1 s"] * 2


def test_what_a_notebook_defines_is_as_it_was_and_a_prediction_that_cannot_be_sent_is_masked(connection, lm):
    first = LAB.trainset[0].numbers

    class Counted(Placed):  # of a function, so that it travels along as a class of a notebook does
        count = 0

        def __init__(self, lm):
            super().__init__(lm)
            self.lock, self.parallel = threading.Lock(), dspy.Parallel()

        def forward(self, **inputs):
            with self.lock:
                Counted.count += 1
            kept = (row for row in ()) if inputs["numbers"] == first else self
            return dspy.Prediction(**super().forward(**inputs).toDict(), kept=kept)

    program = Counted(lm)
    there = on_cluster(program, connection)
    Counted.count = 70
    found = there.rollout(tasks_of(program), "draw")
    assert Counted.count == 70
    assert {rollout.problem for rollout in found if rollout.mask == "ray: prediction cannot be pickled"} == {0}
    others = [rollout.prediction.kept for rollout in found if rollout.prediction]
    assert {type(kept) for kept in others} == {Counted}


def test_a_program_that_ends_its_workers_is_an_error_after_three_of_them(connection, lm):
    program = Ending(lm)
    there = on_cluster(program, connection)
    with pytest.raises(ClusterError, match="1 rollouts were lost 3 times, the last time to WorkerCrashedError"):
        there.rollout(tasks_of(program)[:1], "draw")
    assert there.take_counts() == {"lost to WorkerCrashedError": 2}


def test_what_ends_a_run_is_told_as_what_it_is(connection, lm):
    program = Interrupting(lm)
    with pytest.raises(ClusterError, match="the program or the metric raised KeyboardInterrupt"):
        on_cluster(program, connection).rollout(tasks_of(program)[:1], "draw")


def test_a_cluster_whose_cpus_others_hold_is_an_error_after_a_while(connection, lm, monkeypatch, tmp_path):
    program = Placed(lm)
    there = on_cluster(program, connection)
    monkeypatch.setattr(ray_rollouter, "BEGIN_S", 2.0)
    held = [ray.remote(num_cpus=1)(Held).remote("", tmp_path) for _ in range(2)]
    ray.get([one.__ray_ready__.remote() for one in held], timeout=60)
    try:
        with pytest.raises(ClusterError, match="no worker began to play within 2 s"):
            there.rollout(tasks_of(program)[:2], "draw")
    finally:
        for one in held:
            ray.kill(one)


def test_a_worker_that_hangs_is_given_up_and_what_always_ends_a_worker_is_an_error(
    connection, lm, monkeypatch, tmp_path
):
    monkeypatch.setattr(ray_rollouter, "SILENT_S", -50.0)
    monkeypatch.setattr(ray_rollouter, "MOST_LOSSES", 1)
    program = Stopping(lm, tmp_path / "pid")
    there = on_cluster(program, connection)
    try:
        with pytest.raises(ClusterError, match="lost 1 times, the last time to silence"):
            there.rollout(tasks_of(program)[:1], "draw")
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_a_signal_that_arrives_in_a_call_of_ray_is_told_as_what_it_is(cluster, connection, lm, tmp_path):
    told = tmp_path / "pid"
    program = Stopping(lm, told)
    there = on_cluster(program, connection)

    def stop():
        wait_for(told.exists)
        time.sleep(0.5)  # the run's process waits for the worker then
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    try:
        with pytest.raises(Terminated), signals_raise(), connected(cluster.address):
            there.rollout(tasks_of(program)[:1], "draw")
    finally:
        os.kill(int(told.read_text()), signal.SIGKILL)
