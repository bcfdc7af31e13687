"""What would spoil a run unseen: stale calls, a sampler that is not the trainer, numbers that are not finite."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dspy_fst.engine.in_process import InProcessEngine
from dspy_fst.errors import MismatchError, NotFiniteError, TrainingError
from dspy_fst.policy_lm import policy_of
from dspy_fst.run.directory import read_events
from tests.relay import any_answer, relay
from tests.test_compile import compile_relay, same_weights


def on_engine(alter):
    """The relay on an engine whose completions are altered: ``alter(completion) -> completion``."""

    class Altered(InProcessEngine):
        def complete(self, *asked):
            return alter(super().complete(*asked))

    program = relay()
    policy = policy_of(program)
    original = policy.fork

    def fork():
        forked = original()
        forked.handle._make = Altered
        return forked

    policy.fork = fork
    return program


def steps_of(run_dir):
    return [event["report"] for event in read_events(run_dir) if event["event"] == "step"]


class InfiniteIn:
    """Records an infinite log-probability in these steps; told of the steps that are done as a listener of the run."""

    def __init__(self, steps):
        self._steps, self._done = steps, 0

    def __call__(self, completion):
        if self._done not in self._steps:
            return completion
        return replace(completion, logprobs=(float("-inf"), *completion.logprobs[1:]))

    def hear(self, event):
        self._done += event["event"] == "step"


def test_an_update_that_is_not_finite_is_skipped_kept_for_inspection_and_the_run_goes_on(tmp_path):
    infinite = InfiniteIn((1, 2))
    compile_relay(tmp_path / "run", program=on_engine(infinite), method="rl", listeners=[infinite.hear])
    steps = steps_of(tmp_path / "run")
    assert [bool(step["update"]["skipped"]) for step in steps] == [False, True, True, False]
    assert "skipped/step-000001.json" in steps[1]["update"]["skipped"]
    batch = json.loads((tmp_path / "run" / "skipped" / "step-000001.json").read_text())
    assert float("-inf") in {logprob for row in batch["rows"] for logprob in row["logprobs"]}
    assert any(event["event"] == "warning" and "skip" in event["text"] for event in read_events(tmp_path / "run"))


class InfiniteForOneProblem:
    """Records an infinite log-probability in the calls of the first prompt that each step asks."""

    def __init__(self):
        self._armed, self._prompt = False, None

    def hear(self, event):
        self._armed = self._armed or event.get("phase", "").endswith(": rollouts")

    def __call__(self, completion):
        if self._armed:
            self._armed, self._prompt = False, completion.prompt_ids
        if completion.prompt_ids != self._prompt:
            return completion
        return replace(completion, logprobs=(float("-inf"), *completion.logprobs[1:]))


def test_an_optimizer_step_that_is_not_finite_is_skipped_and_the_others_of_its_batch_are_made(tmp_path):
    infinite = InfiniteForOneProblem()
    several = {"method": "rl", "cycles": 1, "steps_per_cycle": 3, "problems_per_step": 4, "updates_per_batch": 4}
    compile_relay(tmp_path / "run", program=on_engine(infinite), listeners=[infinite.hear], **several)
    warned = [e for e in read_events(tmp_path / "run") if e["event"] == "warning" and "optimizer steps" in e["text"]]
    assert warned
    for step in steps_of(tmp_path / "run"):  # one optimizer step for each live problem but the one that was skipped
        skipped = sum(event["step"] == step["step"] for event in warned)
        assert step["update"]["optimizer_steps"] == step["counts"]["live_groups"] - skipped > 0
    for event in warned:
        batch = json.loads((tmp_path / "run" / event["text"].split("the batch is in ")[1]).read_text())
        assert len({row["problem"] for row in batch["rows"]}) == 1
        assert float("-inf") in {logprob for row in batch["rows"] for logprob in row["logprobs"]}


def test_a_killed_run_of_several_optimizer_steps_a_batch_equals_an_uninterrupted_one(tmp_path):
    """The limit stops no step of a batch but its first: the later ones learn from what weights before them sampled."""
    several = {"method": "rl", "cycles": 1, "steps_per_cycle": 2, "problems_per_step": 4, "updates_per_batch": 2}
    several |= {"min_effective_share": 1 - 1e-6}

    class KilledError(Exception):
        pass

    def kill(event):
        if event["event"] == "step" and event["report"]["step"] == 1:
            raise KilledError

    whole = compile_relay(tmp_path / "whole", **several)
    with pytest.raises(KilledError):
        compile_relay(tmp_path / "killed", listeners=[kill], **several)
    assert same_weights(whole, compile_relay(tmp_path / "killed", **several))
    assert [step["update"]["optimizer_steps"] for step in steps_of(tmp_path / "whole")] == [2, 2]


def test_updates_that_are_never_finite_stop_the_run(tmp_path):
    infinite = InfiniteIn(range(1, 10))
    with pytest.raises(NotFiniteError, match=r"2 updates before this one were skipped.*max_skipped_updates"):
        compile_relay(
            tmp_path / "run",
            program=on_engine(infinite),
            method="rl",
            max_skipped_updates=2,
            listeners=[infinite.hear],
        )
    assert len(steps_of(tmp_path / "run")) == 3


def test_a_sampler_that_is_not_the_trainer_stops_the_run_before_anything_is_learnt(tmp_path):
    noise = np.random.default_rng(0)

    def alter(completion):
        if completion.weights < "step-000001":
            return completion
        return replace(completion, logprobs=tuple(lp - noise.exponential(2.0) for lp in completion.logprobs))

    with pytest.raises(MismatchError, match=r"effective sample share is 0\.\d+, below min_effective_share=0\.5"):
        compile_relay(tmp_path / "run", program=on_engine(alter), method="rl")
    assert len(steps_of(tmp_path / "run")) == 1
    compile_relay(tmp_path / "run", method="rl")  # an honest engine: the run goes on
    assert [step["step"] for step in steps_of(tmp_path / "run")] == [0, 1, 2, 3]


def test_calls_of_other_weights_than_the_step_s_stop_the_run(tmp_path):
    def alter(completion):
        return replace(completion, weights="step-000000")

    with pytest.raises(TrainingError, match=r"step 1: calls were sampled by weights \['step-000000'\]"):
        compile_relay(tmp_path / "run", program=on_engine(alter), method="rl")


def test_on_policy_the_effective_sample_share_is_one(tmp_path):
    compile_relay(tmp_path / "run", method="rl", cycles=1)
    for step in steps_of(tmp_path / "run"):
        assert step["update"]["effective_sample_share"] == pytest.approx(1, abs=1e-6)


def test_the_weights_with_the_best_reward_are_kept(tmp_path):
    compile_relay(tmp_path / "run", method="rl", cycles=4, keep_weights=1)
    steps = steps_of(tmp_path / "run")
    best = max(steps, key=lambda step: step["reward"])["step"]
    kept = {int(path.name[-6:]) for path in (tmp_path / "run" / "weights").glob("step-*")}
    assert kept == {0, best, len(steps)}
    assert len(list((tmp_path / "run" / "states").iterdir())) == 2


def test_another_metric_than_before_is_told_when_a_run_goes_on(tmp_path):
    class StoppedError(Exception):
        pass

    def stop(event):
        if event["event"] == "step" and event["report"]["step"] == 2:
            raise StoppedError

    def other(gold, pred, trace=None):
        return any_answer(gold, pred)

    with pytest.raises(StoppedError):
        compile_relay(tmp_path / "run", method="rl", listeners=[stop])
    compile_relay(tmp_path / "run", method="rl", metric=other)
    told = [event["text"] for event in read_events(tmp_path / "run") if event["event"] == "warning"]
    assert any("the metric changed" in text and "any_answer" in text and "other" in text for text in told)
