"""Groups in place of flat ones (`resample_flat`): who replaces whom, what it costs, and what is said of it."""

from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from dspy_fst.config import FSTConfig
from dspy_fst.errors import ConfigurationError
from dspy_fst.report.from_events import record_of
from dspy_fst.report.standing import Standing
from dspy_fst.report.step_options import option_charts, option_lines, step_words
from dspy_fst.run.directory import read_events
from dspy_fst.slow.credit import credit
from dspy_fst.training.plan import Plan, is_stuck
from dspy_fst.training.resampling import is_flat, refilled, resampling_counts
from dspy_fst.training.step_problems import StepProblems, trainset_warnings
from dspy_fst.types import Candidate, Group
from tests.relay import any_answer
from tests.slow.makers import make_call, make_group, make_rollout
from tests.test_compile import compile_relay, same_weights

RIGHT, WRONG, ALIKE, LIVE = (1.0, 1.0), (0.0, 0.0), (0.5, 0.5), (0.0, 1.0)
UNMEASURED = (None, 1.0)


def flat(group):
    return is_flat(group, credit)


def made(rewards, rounds, others):
    """The groups of a step whose first three problems are its own; problem -> its group's rewards."""
    groups = {problem: make_group(*of, problem=problem) for problem, of in rewards.items()}
    asked = []

    def sample(problems):
        asked.append(list(problems))
        return [groups[problem] for problem in problems]

    return refilled([groups[0], groups[1], groups[2]], others, rounds, flat, sample), asked


REWARDS = {0: RIGHT, 1: LIVE, 2: WRONG, 7: ALIKE, 8: LIVE, 9: UNMEASURED, 5: LIVE}


@pytest.mark.parametrize(
    ("rounds", "others", "asked"),
    [
        (0, [7, 8, 9, 5], []),
        (1, [7, 8, 9, 5], [[7, 8]]),
        (2, [7, 8, 9, 5], [[7, 8], [9]]),
        (9, [7, 8, 9, 5], [[7, 8], [9]]),  # the group of 9 was not measured, which no other problem would mend
        (9, [7], [[7]]),
        (9, [], []),
        (9, [8, 5, 7], [[8, 5]]),
    ],
    ids=["off", "once", "twice", "until-none-is-flat", "one-other", "no-other", "full-at-once"],
)
def test_each_flat_group_of_a_round_is_replaced_by_the_next_problem(rounds, others, asked):
    groups, wanted = made(REWARDS, rounds, others)
    assert wanted == asked
    assert [group.problem for group in groups] == [0, 1, 2, *(problem for of in asked for problem in of)]


def test_the_counts_name_what_was_sampled_and_what_was_dropped():
    groups, _ = made(REWARDS, 2, [7, 8, 9])
    counts = {"resampled_groups": 3, "resampled_rollouts": 6}
    dropped = {"dropped: all right": 2, "dropped: all wrong": 2, "dropped: all alike": 2}
    assert resampling_counts(groups, 3, flat, 0.0, 1.0) == {**counts, **dropped}
    # Of 3 + 3 groups three are flat, two are live and one was not measured; the live ones share the batch.
    batch = credit(groups)
    assert {batch.counts[name] for name in ("flat_groups", "groups")} == {3, 6}
    assert Counter(row.problem for row in batch.rows) == {1: 2, 8: 2}
    assert {row.token_weight for row in batch.rows} == {1 / (2 * 4)}


@pytest.mark.parametrize(
    ("baseline", "alike"),
    [("problem", False), ("candidate", True)],
)
def test_a_group_is_flat_where_credit_drops_it(baseline, alike):
    """Two candidates of which one always scores: they differ from each other, and each is alike in itself."""
    always = Candidate({"answer": "Another."})
    rollouts = [
        *[make_rollout(0.0, make_call()) for _ in range(2)],
        *[replace(make_rollout(1.0, make_call()), candidate=always) for _ in range(2)],
    ]
    group = Group(0, tuple(rollouts))
    assert is_flat(group, partial(credit, baseline=baseline)) == alike == (not credit([group], baseline=baseline).rows)


def of_another(rollout):
    return replace(rollout, candidate=Candidate({"answer": "Another."}))


@pytest.mark.parametrize("rewards", [UNMEASURED, (None, None)], ids=["one", "none"])
def test_a_group_that_was_not_measured_is_not_flat(rewards):
    assert not flat(make_group(*rewards))


@pytest.mark.parametrize(
    ("own", "new", "stuck"),
    [
        ([WRONG, WRONG], [LIVE, LIVE], True),  # of all four groups only half are flat, and their mean is 0.25
        ([WRONG, WRONG], [RIGHT, RIGHT, RIGHT], True),  # the others' rewards are not the step's own
        ([WRONG, LIVE], [WRONG, WRONG], False),
        ([RIGHT, RIGHT], [WRONG, WRONG, WRONG], False),
        ([UNMEASURED, WRONG], [RIGHT], False),
    ],
    ids=["live", "solved", "others-flat", "own-solved", "unmeasured"],
)
@pytest.mark.parametrize("apart", [False, True], ids=["pooled", "candidates-apart"])
def test_a_step_is_stuck_by_its_own_groups(own, new, stuck, apart):
    groups = [make_group(*rewards, problem=problem) for problem, rewards in enumerate([*own, *new])]
    problems = StepProblems(FSTConfig(resample_flat=1), range(len(own)))
    if apart:  # each rollout is compared with those of its own candidate: a group is then several
        groups = [replace(group, rollouts=(*group.rollouts, *map(of_another, group.rollouts))) for group in groups]
    credited = partial(credit, baseline="candidate" if apart else "problem")
    counts = problems.counted(credited(groups), groups, credited).counts
    means = [
        (g.problem, sum(r.reward for r in g.rollouts) / len(g.rollouts))
        for g in groups
        if all(r.reward is not None for r in g.rollouts)
    ]
    every = [reward for _, reward in means]
    report = SimpleNamespace(counts=counts, reward=sum(every) / len(every), group_rewards=tuple(means))
    assert is_stuck(report, 0.75, 1.0) == stuck


# ---- plan and budget -----------------------------------------------------------------------------

SMALL = {"problems_per_step": 4, "steps_per_cycle": 3, "cycles": 2, "group_size": 4, "population_size": 2}


def test_other_problems_come_in_an_order_of_the_step_and_the_search_sees_what_it_saw():
    plain, plan = Plan(FSTConfig(**SMALL), 12), Plan(FSTConfig(**SMALL, resample_flat=2), 12)
    own = plan.problems(1)
    others = plan.others(1, own)
    assert sorted([*own, *others]) == list(range(12))
    assert others == plan.others(1, own) != plan.others(2, own)
    assert [problem for problem in others if problem != others[0]] == plan.others(1, [*own, others[0]])
    assert [plan.anchors(cycle) for cycle in range(2)] == [plain.anchors(cycle) for cycle in range(2)]
    assert [plan.problems(step) for step in range(6)] == [plain.problems(step) for step in range(6)]


@pytest.mark.parametrize(
    ("size", "rounds", "groups"), [(40, 2, 8), (10, 2, 6), (4, 2, 0), (40, 0, 0)], ids=["rounds", "few", "none", "off"]
)
def test_the_budget_counts_every_group_that_may_be_replaced(size, rounds, groups):
    budget = Plan(FSTConfig(**SMALL, resample_flat=rounds), size).budget(0)
    assert budget.resampled_rollouts == 6 * groups * 4
    assert budget.training_rollouts == 6 * 4 * 4 + budget.resampled_rollouts


def test_a_trainset_without_other_problems_is_told_before_work():
    config = FSTConfig(**SMALL, resample_flat=2)
    assert trainset_warnings(config, 5) == trainset_warnings(FSTConfig(**SMALL), 4) == []
    (warning,) = trainset_warnings(config, 4)
    assert warning.startswith("resample_flat=2: each batch holds all 4 examples of the trainset (problems_per_step=4)")
    (warning,) = trainset_warnings(FSTConfig(**SMALL, resample_flat=2, retire_solved=0.9), 4)
    assert warning.startswith("resample_flat=2 and retire_solved=0.9: each batch holds all 4 examples")
    assert trainset_warnings(FSTConfig(**SMALL, resample_flat=2, method="gepa"), 4) == []


@pytest.mark.parametrize(
    ("size", "options", "told"),
    [
        (24, {}, True),
        (27, {}, True),
        (23, {}, False),  # five batches an epoch, so the sixth step begins a second one
        (24, {"resample_flat": 1}, False),
        (24, {"method": "gepa"}, False),
        (24, {"retire_solved": None}, False),
    ],
    ids=["once", "remainder", "twice", "resampled", "gepa", "off"],
)
def test_a_plan_that_meets_no_problem_twice_retires_none_and_that_is_told(size, options, told):
    config = FSTConfig(**{**SMALL, "retire_solved": 0.9, **options})
    warnings = trainset_warnings(config, size)
    assert len(warnings) == told
    for warning in warnings:
        assert warning.startswith(
            f"retire_solved=0.9 does nothing in this plan: its 6 steps meet none of the {size} ex"
        )
    plan = Plan(config, size)
    met = [problem for step in range(plan.updates) for problem in plan.problems(step)]
    if told:
        assert len(met) == len({*met})


def test_the_time_that_is_left_follows_what_steps_cost_and_not_the_most_that_they_may():
    standing = Standing()
    standing.budget = {"updates": 4, "training_rollouts": 300}
    assert standing.left()["train"] == 300
    report = {"counts": {"rollouts": 40, "resampled_groups": 2, "held_rollouts": 10}}
    standing.add({"event": "step", "report": report})
    assert (standing.left()["train"], standing.spent) == (3 * 50, 50)
    standing.budget["training_rollouts"] = 120  # what is planned is the most
    assert standing.left()["train"] == 70


def test_what_learns_from_no_reward_has_no_flat_group():
    distill = {"method": "distill", "seed_kl_coefficient": 1.0, "seed_kl_teacher": "population"}
    with pytest.raises(ConfigurationError, match=r"method='distill' learns from no reward, and resample_flat=1 would"):
        FSTConfig.checked({**distill, "resample_flat": 1})


# ---- whole runs ----------------------------------------------------------------------------------

RL = {"method": "rl", "cycles": 1, "steps_per_cycle": 2, "problems_per_step": 6}


class HalfFlat:
    """Scores all answers alike where the list begins with an even number; notes what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, gold, pred, trace=None, pred_name=None, pred_trace=None):
        self.asked.append(gold.numbers)
        return 0.5 if int(gold.numbers.split()[0]) % 2 == 0 else any_answer(gold, pred)


def reports(run_dir):
    """What each step reported, but for its times."""
    steps = [event["report"] for event in read_events(run_dir) if event["event"] == "step"]
    return [{**step, "seconds": None} for step in steps]


def test_a_run_samples_other_problems_in_place_of_flat_ones_and_pays_for_them(tmp_path):
    compile_relay(tmp_path / "plain", metric=HalfFlat(), **RL)
    metric = HalfFlat()
    compile_relay(tmp_path / "run", metric=metric, resample_flat=2, **RL)
    plain, steps = reports(tmp_path / "plain"), reports(tmp_path / "run")
    assert "resampled_groups" not in plain[0]["counts"]
    for step in steps:
        counts = step["counts"]
        assert counts["resampled_groups"] > 0
        assert counts["groups"] == 6 + counts["resampled_groups"]
        assert counts["rollouts"] == 4 * counts["groups"]
        assert sum(count for name, count in counts.items() if name.startswith("dropped")) == 4 * counts["flat_groups"]
    assert steps[0]["counts"]["live_groups"] > plain[0]["counts"]["live_groups"]
    events = read_events(tmp_path / "run")
    budget = next(event["budget"] for event in events if event["event"] == "plan")
    assert budget["training_rollouts"] == 2 * (6 + 12) * 4
    record = record_of(events, name="run")
    paid = sum(step["counts"]["rollouts"] for step in steps)
    assert record.costs.training_rollouts == paid <= budget["training_rollouts"]
    assert "resample_flat: " in option_lines(record.steps)[0]
    assert step_words(steps[0]) == f", {steps[0]['counts']['resampled_groups']} groups resampled"
    assert [chart.name for chart in option_charts([record])] == ["resampled-groups"]


def test_a_killed_run_replaces_the_same_groups_again(tmp_path):
    class KilledError(Exception):
        pass

    def kill(event):
        if event["event"] == "step" and event["report"]["step"] == 1:
            raise KilledError

    whole = compile_relay(tmp_path / "whole", metric=HalfFlat(), resample_flat=1, **RL)
    with pytest.raises(KilledError):
        compile_relay(tmp_path / "killed", metric=HalfFlat(), resample_flat=1, listeners=[kill], **RL)
    again = compile_relay(tmp_path / "killed", metric=HalfFlat(), resample_flat=1, **RL)
    assert same_weights(whole, again)
    assert reports(tmp_path / "whole") == reports(tmp_path / "killed")
