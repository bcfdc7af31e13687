"""A warm start in a run: what it brings and costs; and a run that dies in it, which ends bit for bit alike."""

import pytest
from safetensors.torch import load_file

from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.engine.base import Checkpoint
from dspy_fst.policy_lm import policy_of
from dspy_fst.report.from_directory import read_record
from dspy_fst.report.summary import summary_of
from dspy_fst.run.directory import read_events
from dspy_fst.training.result import start_of
from dspy_fst.types import WARM_START
from programs.lab import BASE, build
from tests.relay import any_answer, relay
from tests.test_compile import propose, same_weights

WARM = {
    "method": "rl",
    "cycles": 1,
    "steps_per_cycle": 1,
    "problems_per_step": 4,
    "population_size": 1,
    "group_size": 4,
    "warm_start": "labels",
    "warm_start_examples": 32,
    "warm_start_epochs": 2,
    "warm_start_learning_rate": 2e-3,
    "learning_rate": 1e-4,
    "progress": False,
}


class Killed(BaseException):
    """The process dies here."""


def compiled_in(run_dir, listeners=()):
    lab = build("reverse", train=32, val=16, test=4)
    lab.program.set_lm(PolicyLM(BASE, engine="in_process", max_tokens=16, engine_options={"linger_s": 60.0}))
    optimizer = FSTOptimizer(metric=lab.metric, propose=propose, run_dir=run_dir, listeners=listeners, **WARM)
    return optimizer.compile(lab.program, trainset=lab.trainset, valset=lab.valset)


def dies_at(words):
    def listener(event):
        if str(event.get("phase") or event.get("text") or "").removeprefix("warning: ").startswith(words):
            raise Killed

    return listener


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("warm") / "run"
    program = compiled_in(path)
    yield path, program
    policy_of(program).release()


def test_labels_raise_the_reward_over_the_start_and_are_counted(whole):
    path, program = whole
    record = read_record(path, "warm")
    start, end = record.validations[0], record.validations[-1]
    assert (start.weights, record.steps[0].sampled_by) == ("step-000000", WARM_START)
    assert end.score >= start.score + 0.25
    warm, costs = record.warm_start, record.costs
    assert (warm.source, warm.examples, warm.pairs, warm.left_out) == ("labels", 32, {"solve": 32}, {})
    assert (costs.warm_updates, costs.teacher_rollouts) == (8, 0)
    assert costs.warm_tokens == warm.tokens > 2 * 32 * 4
    assert costs.updates <= 1  # its updates are not the run's
    assert warm.last_loss < warm.first_loss
    assert record.steps[0].update.kl_to_start < 1e-4  # of what the warm start left, and not of the student
    assert "from labels: 32 replies (solve 32), 8 updates" in str(summary_of(record))
    assert start_of(program).version == "step-000000"  # the base of a 2x2 table is the student's own
    told = [event["text"] for event in read_events(path) if event["event"] == "note"]
    assert any("after the warm start 100% of the replies to the first 4 examples parse" in text for text in told)


def test_a_run_that_dies_in_its_warm_start_ends_alike(whole, tmp_path, monkeypatch):
    def dies(*_):
        raise Killed

    for words in ("warm start: learning", "before it is told", "after the warm start"):
        with monkeypatch.context() as patched:
            if words == "before it is told":
                patched.setattr("dspy_fst.training.open_run.told_after", dies)
            with pytest.raises(Killed):
                compiled_in(tmp_path / "run", [dies_at(words)])
    program = compiled_in(tmp_path / "run")
    assert same_weights(program, whole[1])
    events = read_events(tmp_path / "run")
    assert [event["event"] for event in events].count("warm_start") == 1
    assert sum(event.get("text", "").startswith("after the warm start") for event in events) == 1
    policy_of(program).release()


def test_each_lora_adapter_learns_its_own_predictor_s_replies_and_is_its_kl_s_reference(tmp_path):
    lab = build("reverse", train=32, val=4, test=4)
    optimizer = FSTOptimizer(
        metric=any_answer,
        propose=propose,
        run_dir=tmp_path / "run",
        adapter="lora",
        adapters="per_predictor",
        **{**WARM, "warm_start_examples": 8, "steps_per_cycle": 1},
    )
    program = optimizer.compile(relay(), trainset=lab.trainset)
    record = read_record(tmp_path / "run", "lora")
    assert record.warm_start.pairs == {"first": 8, "last": 8}
    assert record.warm_start.updates == 2 * 2  # each adapter's pairs are a batch of their own
    update = record.steps[0].update
    assert update.tokens
    assert update.kl_to_start < 1e-4
    assert policy_of(program).checkpoint.predictors.keys() == {"first", "last"}
    weights = tmp_path / "run" / "weights"
    warm, start = (Checkpoint.at(v, weights / v).adapters for v in (WARM_START, "step-000000"))
    for one, other in zip(warm, start, strict=True):
        learnt, drawn = (load_file(adapter.path / "adapter_model.safetensors") for adapter in (one, other))
        assert any(not learnt[key].equal(drawn[key]) for key in learnt)
    policy_of(program).release()
