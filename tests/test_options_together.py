"""All options of a step in one run, which is killed in many places and goes on as if nobody had touched it."""

from contextlib import contextmanager, suppress

import pytest

from dspy_fst.report.from_events import record_of
from dspy_fst.report.step_options import option_charts, option_lines, step_words
from dspy_fst.run import state, state_writer
from dspy_fst.run.directory import read_events
from dspy_fst.slow.trainer import Trainer
from tests.relay import any_answer
from tests.test_compile import compile_relay, same_weights, told

TOGETHER = {
    "cycles": 2,
    "steps_per_cycle": 3,
    "checkpoint_every": 2,
    "reuse_rollouts": True,
    "resample_flat": 1,
    "retire_solved": 0.9,
    "updates_per_batch": 3,
    "overlong_penalty": 0.5,
    "overlong_share": 0.75,
}


class KilledError(BaseException):
    """Ends a run: no rule of the run catches it."""


def some_are_solved_and_some_flat(gold, pred, trace=None, pred_name=None, pred_trace=None):
    """By the first number of the list: always right, always half right, or as the answer is."""
    number = int(gold.numbers.split()[0])
    return 1.0 if number < 3 else 0.5 if number % 2 else min(0.75, any_answer(gold, pred).score)


def compiled(folder, *listeners):
    return compile_relay(folder, metric=some_are_solved_and_some_flat, listeners=[*listeners], **TOGETHER)


# ---- where it is killed --------------------------------------------------------------------------


def at(matches):
    """As soon as an event matches."""

    @contextmanager
    def death(patch):
        def listen(event):
            if matches(event):
                raise KilledError

        yield [listen]

    return death


def among_rollouts(phase, passed):
    """After so many rollouts of a phase, those that answer first: the others are lost with them."""

    @contextmanager
    def death(patch):
        seen = {"phase": "", "rollouts": 0}

        def listen(event):
            seen["phase"] = event.get("phase", seen["phase"])
            seen["rollouts"] += event["event"] == "rollout" and seen["phase"] == phase
            if seen["rollouts"] > passed:
                raise KilledError

        yield [listen]

    return death


def among_optimizer_steps(number):
    """Before the ``number``-th optimizer step of this process, counted from 0."""

    @contextmanager
    def death(patch):
        made, step = [], Trainer.step

        def counted(self, *given, **named):
            if len(made) == number:
                raise KilledError
            made.append(step(self, *given, **named))
            return made[-1]

        patch.setattr(Trainer, "step", counted)
        yield []

    return death


def in_the_state_of(step, written):
    """While the state after so many steps is written, or just after it appeared, before anything else happens."""

    @contextmanager
    def death(patch):
        def commit(folder, fields, *given, **named):
            due = fields["step"] == step
            if due and not written:
                raise KilledError
            newest = state.commit_state(folder, fields, *given, **named)
            if due:
                raise KilledError
            return newest

        patch.setattr(state_writer, "commit_state", commit)
        yield []

    return death


DEATHS = {
    "the first step samples": among_rollouts("step 0: rollouts", 9),
    "between the first step's optimizer steps": among_optimizer_steps(2),
    "its state is lost, and two steps with it": in_the_state_of(2, written=False),
    "the state has just appeared": in_the_state_of(2, written=True),
    "step 2 samples in place of flat groups": among_rollouts("step 2: rollouts", 25),
    "search 1 goes on": among_rollouts("cycle 1: evolving instructions", 5),
    "its state is lost": in_the_state_of(3, written=False),
    "the step after it samples": among_rollouts("step 3: rollouts", 3),
    "step 4 is done and its state is not due": at(lambda e: e["event"] == "step" and e["report"]["step"] == 4),
}


def was_killed(folder, death, monkeypatch):
    with monkeypatch.context() as patch, death(patch) as listeners, suppress(KilledError):
        compiled(folder, *listeners)
        return False
    return True


def steps_of(folder):
    return [event["report"] for event in read_events(folder) if event["event"] == "step"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder, told = tmp_path_factory.mktemp("together") / "whole", []
    return compiled(folder, told.append), folder, [event["text"] for event in told if event["event"] == "note"]


def test_every_option_does_something_and_nothing_is_counted_twice(whole):
    steps = steps_of(whole[1])
    total = {name: sum(step["counts"].get(name, 0) for step in steps) for name in ("reused", "resampled_groups")}
    assert min(total.values()) > 0
    assert steps[-1]["counts"]["retired_problems"] > 0
    assert all(step["length_penalty"] > 0 for step in steps)
    assert {step["update"]["optimizer_steps"] for step in steps} == {3}
    for step in steps:
        counts = step["counts"]
        assert counts["rollouts"] == 4 * counts["groups"] == 4 * (6 + counts["resampled_groups"])
        assert len({problem for problem, _ in step["group_rewards"]}) == counts["groups"]
    record = record_of(read_events(whole[1]))
    assert record.costs.training_rollouts == sum(s["counts"]["rollouts"] for s in steps) - total["reused"]


def test_the_plan_names_the_optimizer_steps_and_a_step_what_they_measured(whole):
    (plan,) = [text for text in whole[2] if text.startswith("slow: ")]
    assert plan.startswith("slow: 6 updates of up to 3 optimizer steps each, up to ")
    assert "after 10 warm-up optimizer steps" in plan
    (step, *_), record = steps_of(whole[1]), record_of(read_events(whole[1]))
    moved = step["update"]["later_log_ratio"]
    assert moved > 10 * step["update"]["max_log_ratio"]
    assert step_words(step).endswith(f", 3 optimizer steps (0.0% of tokens capped, log-ratio up to {moved:.2g})")
    (line,) = [line for line in option_lines(record.steps) if line.startswith("updates_per_batch: ")]
    most = max(each.update.later_log_ratio for each in record.steps)
    assert line == (
        "updates_per_batch: 18 optimizer steps in 6 updates; 0.0% of their tokens were capped; after the first of a "
        f"batch log-ratios were up to {most:.2g}."
    )
    assert {"optimizer-steps", "later-log-ratio"} < {chart.name for chart in option_charts([record])}


@pytest.mark.slow
def test_killed_in_many_places_it_ends_as_if_nobody_had_touched_it(whole, tmp_path, monkeypatch):
    for where, death in DEATHS.items():
        assert was_killed(tmp_path / "run", death, monkeypatch), where
    resumed = compiled(tmp_path / "run")
    assert same_weights(whole[0], resumed)
    assert whole[0].population == resumed.population
    untouched, killed = ([told(e) for e in read_events(run)] for run in (whole[1], tmp_path / "run"))
    for one, other in zip(untouched, killed, strict=True):
        assert one == other
    costs = [record_of(read_events(run)).costs for run in (whole[1], tmp_path / "run")]
    assert costs[0].rollouts == costs[1].rollouts
