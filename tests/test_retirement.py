"""Problems that are solved leave the batches (`retire_solved`): which, when, and what happens when too few are left."""

from dataclasses import replace
from types import SimpleNamespace

import dspy
import pytest

from dspy_fst import FSTOptimizer
from dspy_fst.config import FSTConfig
from dspy_fst.errors import ConfigurationError
from dspy_fst.monitoring.rules import History, reward_fell, taken_back
from dspy_fst.report.from_events import record_of
from dspy_fst.report.step_options import option_charts, option_lines, step_words
from dspy_fst.run.directory import RunDirectory, read_events
from dspy_fst.slow.update_metrics import NO_UPDATE
from dspy_fst.training.plan import Cycle, Plan
from dspy_fst.training.recorder import Recorder
from dspy_fst.training.retirement import pass_reward, retired_after, without_retired
from dspy_fst.training.step_problems import step_problems
from dspy_fst.types import Batch, Group
from programs.lab import build
from tests.relay import any_answer, relay
from tests.slow.makers import make_group
from tests.test_compile import SHORT, compile_relay, propose, same_weights
from tests.test_resampling import RL, HalfFlat, reports

SMALL = {"problems_per_step": 4, "steps_per_cycle": 3, "cycles": 2}


def report(step, *rewards):
    return SimpleNamespace(step=step, group_rewards=rewards)


HISTORY = [
    report(0, (1, 0.9), (2, 0.89), (3, 1.0), (4, 0.0)),
    report(1, (3, 0.95), (2, 0.9), (5, 1.0)),
    report(2, (1, 0.5), (4, 0.25)),
]


@pytest.mark.parametrize(
    ("steps", "retired"),
    [(0, {}), (1, {1: 0, 3: 0}), (2, {1: 0, 3: 1, 2: 1, 5: 1}), (3, {3: 1, 2: 1, 5: 1})],
    ids=["start", "one", "two", "three"],
)
def test_the_newest_group_of_a_problem_decides(steps, retired):
    """The order counts too: the least recently retired first."""
    assert list(retired_after(HISTORY[:steps], 0.9).items()) == list(retired.items())


@pytest.mark.parametrize(
    ("settings", "reward"),
    [
        ({}, 0.9),
        ({"perfect_score": 10.0}, 9.0),
        ({"failure_score": -1.0}, 0.8),
        ({"format_failure_score": -1.0}, 0.9),  # 9 of 10 right pass, whatever form the tenth has
    ],
    ids=["rate", "scale", "from-the-failure", "form"],
)
def test_the_threshold_is_a_share_of_the_way_to_a_perfect_score(settings, reward):
    config = FSTConfig(retire_solved=0.9, **settings)
    assert pass_reward(config) == pytest.approx(reward)
    assert retired_after([report(0, (0, sum([1.0] * 9 + [0.0]) / 10))], pass_reward(FSTConfig(retire_solved=0.9)))


def test_a_retired_problem_is_replaced_by_one_that_is_not():
    plan = Plan(FSTConfig(**SMALL), 8)
    planned = plan.problems(0)
    rest = plan.others(0, planned)
    problems, back = without_retired(plan, 0, {planned[1]: 0, rest[0]: 0})
    assert (problems, back) == ([planned[0], planned[2], planned[3], rest[1]], [])


def test_where_too_few_are_left_the_least_recently_retired_come_back():
    plan = Plan(FSTConfig(**SMALL), 6)
    planned, rest = plan.problems(0), plan.others(0, plan.problems(0))
    retired = {rest[0]: 2, planned[3]: 3, planned[0]: 5, planned[1]: 7}
    problems, back = without_retired(plan, 0, retired)
    assert (problems, back) == ([planned[2], rest[1], rest[0], planned[3]], [rest[0], planned[3]])
    everything = dict.fromkeys([5, 4, 3, 2, 1, 0], 1)
    assert without_retired(plan, 0, everything) == ([5, 4, 3, 2], [5, 4, 3, 2])


def test_nothing_is_retired_without_the_setting_and_the_others_are_not_retired_either():
    plan = Plan(FSTConfig(**SMALL), 12)
    assert step_problems(plan, 3, HISTORY).batch == plan.problems(3)
    both = Plan(FSTConfig(**SMALL, retire_solved=0.9, resample_flat=1), 12)
    chosen = step_problems(both, 3, HISTORY)
    assert (chosen.retired, chosen.taken_back) == (3, 0)
    assert {*chosen.batch, *chosen.others} == {*range(12)} - {3, 2, 5}
    assert not {*chosen.batch} & {*chosen.others}
    assert [both.anchors(cycle) for cycle in range(2)] == [plan.anchors(cycle) for cycle in range(2)]


@pytest.mark.parametrize(
    ("fresh", "of_the_search", "retired"),
    [([1, 1], [1, 1], True), ([1, 1], [1, 0], False), ([1, 0], [1, 1], False), ([], [1, 1], True)],
    ids=["all-right", "one-of-the-search-wrong", "one-fresh-wrong", "all-of-the-search"],
)
def test_rollouts_of_the_search_count_towards_the_pass_rate(tmp_path, fresh, of_the_search, retired):
    """They are samples of the same weights and texts. A few rollouts of an unsolved one are all right more often."""
    reused = [replace(rollout, reused=True) for rollout in make_group(*map(float, of_the_search)).rollouts]
    group = Group(0, (*make_group(*map(float, fresh)).rollouts, *reused))
    run = RunDirectory(tmp_path / "run", {})
    recorder = Recorder(run, "metric")
    recorder.step_done(0, Cycle(0, 9, range(1)), [group], Batch((), ""), NO_UPDATE, {}, "step-000000", {}, None)
    run.close()
    assert ([*retired_after(recorder.comparable, 0.9)] == [0]) == retired


@pytest.mark.parametrize("share", [0.0, 1.1, -0.5], ids=str)
def test_a_share_is_above_0_and_at_most_1(share):
    with pytest.raises(ConfigurationError, match="retire_solved="):
        FSTConfig.checked({"retire_solved": share})


# ---- whole runs ----------------------------------------------------------------------------------


class SolvedFrom:
    """Gives every rollout of a list that begins with one of these numbers a perfect score."""

    def __init__(self, *first):
        self.first = {*map(str, first)}

    def __call__(self, gold, pred, trace=None, pred_name=None, pred_trace=None):
        solved = gold.numbers.split()[0] in self.first
        return dspy.Prediction(score=1.0 if solved else min(0.5, any_answer(gold, pred).score))


LONG = {**RL, "steps_per_cycle": 6, "group_size": 2, "retire_solved": 0.75}


def solved_in(step, threshold):
    return {problem for problem, reward in step["group_rewards"] if reward >= threshold}


def test_a_run_samples_what_it_solved_no_more(tmp_path):
    """32 problems, 6 a step: the second epoch begins with the sixth step, and then meets none that were solved."""
    compile_relay(tmp_path / "run", metric=SolvedFrom(*range(5)), **LONG)
    steps = reports(tmp_path / "run")
    retired = set()
    for step in steps:
        assert len(step["group_rewards"]) == len({problem for problem, _ in step["group_rewards"]}) == 6
        assert step["counts"]["retired_problems"] == len(retired)
        assert step["counts"]["taken_back_problems"] == 0
        assert not retired & {problem for problem, _ in step["group_rewards"]}
        retired |= solved_in(step, 0.75)
    assert retired
    record = record_of(read_events(tmp_path / "run"))
    assert f"{steps[-1]['counts']['retired_problems']} problems retired before step 5." in option_lines(record.steps)[0]
    assert step_words(steps[-1]) == f", {steps[-1]['counts']['retired_problems']} problems retired"
    assert [chart.name for chart in option_charts([record])] == ["retired-problems"]


def test_a_run_whose_problems_are_all_solved_goes_on_with_those_retired_longest_ago_and_says_so(tmp_path):
    """All 8 problems are retired after two steps of 6, so later steps take back."""
    lab = build(train=8, val=1, test=1)
    settings = {**SHORT, **RL, "steps_per_cycle": 4, "retire_solved": 0.5, "max_unmoved_steps": None}
    optimizer = FSTOptimizer(metric=lambda gold, pred, trace=None: 1.0, propose=propose, run_dir=tmp_path, **settings)
    optimizer.compile(relay(), trainset=lab.trainset)
    steps = reports(tmp_path)
    assert [len(step["group_rewards"]) for step in steps] == [6] * 4
    assert steps[1]["counts"]["taken_back_problems"] >= 4
    warned = [event["text"] for event in read_events(tmp_path) if event["event"] == "warning"]
    assert any("problems were solved and retired (retire_solved), too many to fill a batch" in text for text in warned)


def test_the_warning_names_what_was_taken_back():
    now = SimpleNamespace(step=4, counts={"retired_problems": 30, "taken_back_problems": 4})
    finding = taken_back(History([now], 0.0, 1.0, 0.1))
    assert str(finding) == (
        "step 4: 30 problems were solved and retired (retire_solved), too many to fill a batch with others; 4 that "
        "were retired longest ago were taken back. Stop here, give harder problems, or lower problems_per_step"
    )
    assert taken_back(History([SimpleNamespace(step=4, counts={"retired_problems": 30})], 0.0, 1.0, 0.1)) is None


@pytest.mark.parametrize(("counts", "told"), [({}, True), ({"retired_problems": 0}, False)], ids=["off", "on"])
def test_a_reward_that_falls_as_solved_problems_leave_is_no_warning(counts, told):
    rewards = [0.9] * 5 + [0.1] * 5
    reports = [SimpleNamespace(step=step, reward=reward, counts=counts) for step, reward in enumerate(rewards)]
    assert bool(reward_fell(History(reports, 0.0, 1.0, 0.1))) == told


def test_what_another_metric_called_solved_is_sampled_again(tmp_path):
    class KilledError(Exception):
        pass

    def kill(event):
        if event["event"] == "step" and event["report"]["step"] == 2:
            raise KilledError

    settings = {**RL, "steps_per_cycle": 4, "retire_solved": 0.75}
    with pytest.raises(KilledError):
        compile_relay(
            tmp_path, metric=lambda gold, pred, trace=None: 1.0, listeners=[kill], max_unmoved_steps=None, **settings
        )
    assert reports(tmp_path)[-1]["counts"]["retired_problems"] == 12
    compile_relay(tmp_path, metric=SolvedFrom(*range(5)), max_unmoved_steps=None, **settings)
    steps = reports(tmp_path)
    assert len({step["judged_by"] for step in steps}) == 2
    assert [step["counts"]["retired_problems"] for step in steps] == [0, 6, 0, len(solved_in(steps[2], 0.75))]


def test_a_killed_run_retires_the_same_problems(tmp_path):
    class KilledError(Exception):
        pass

    def kill(event):
        if event["event"] == "step" and event["report"]["step"] == 2:
            raise KilledError

    settings = {**RL, "steps_per_cycle": 4, "retire_solved": 0.5, "resample_flat": 1, "problems_per_step": 8}
    whole = compile_relay(tmp_path / "whole", metric=HalfFlat(), **settings)
    with pytest.raises(KilledError):
        compile_relay(tmp_path / "killed", metric=HalfFlat(), listeners=[kill], **settings)
    again = compile_relay(tmp_path / "killed", metric=HalfFlat(), **settings)
    assert same_weights(whole, again)
    assert reports(tmp_path / "whole") == reports(tmp_path / "killed")
    assert reports(tmp_path / "whole")[-1]["counts"]["retired_problems"] > 0
