"""Rollouts of a search in the groups of the step after it (`reuse_rollouts`): which, how many, exact, and once."""

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import dspy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_fst import FSTOptimizer
from dspy_fst.config import FSTConfig
from dspy_fst.errors import ConfigurationError
from dspy_fst.outcomes.outcome import Outcome
from dspy_fst.report.from_events import record_of
from dspy_fst.report.run_record import RunRecord
from dspy_fst.report.step_options import option_charts, option_lines, step_words
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.jsonable import rollouts_from_json, rollouts_to_json, trainable_to_json
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.run.directory import RunDirectory, read_events
from dspy_fst.training.plan import Plan
from dspy_fst.training.reuse import DOCUMENT, Reuse
from dspy_fst.training.step_problems import step_problems
from dspy_fst.training.without_effect import settings_without_effect
from dspy_fst.types import Batch, Candidate, Group, Population, Problem
from programs.lab import build
from tests.fakes import fields, scripted_policy
from tests.relay import relay
from tests.slow.makers import make_call, make_rollout
from tests.test_compile import SHORT, compile_relay, propose, same_weights, told

# ---- which problems a step has -------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(4, 50),
    steps=st.integers(1, 5),
    anchors=st.one_of(st.none(), st.integers(1, 20)),
    method=st.sampled_from(["fst", "gepa_then_rl", "rl", "rl_then_gepa"]),
    seed=st.integers(0, 3),
)
def test_the_step_after_a_search_has_anchors_first_and_an_epoch_shows_what_it_showed(
    size, steps, anchors, method, seed
):
    recipe = {"cycles": 4, "steps_per_cycle": steps, "problems_per_step": 4, "anchors": anchors, "method": method}
    plain, plan = (Plan(FSTConfig(**recipe, seed=seed, reuse_rollouts=on), size) for on in (False, True))
    per_epoch, searched = size // 4, [c.index for c in plan.cycles if c.search_budget and c.steps]
    assert [plan.anchors(c) for c in range(4)] == [plain.anchors(c) for c in range(4)]
    for epoch in range(-(-plan.updates // per_epoch)):
        of = [step for step in range(plan.updates) if step // per_epoch == epoch]
        shown = [[p for step in of for p in each.problems(step)] for each in (plain, plan)]
        assert len(shown[1]) == len({*shown[1]})
        assert sorted(shown[0]) == sorted(shown[1])
    for cycle in range(4):
        first, *others = range(cycle * steps, (cycle + 1) * steps)
        if cycle not in searched:
            assert [plan.problems(s) for s in (first, *others)] == [plain.problems(s) for s in (first, *others)]
            continue
        same_epoch = [s for s in (first, *others) if s // per_epoch == first // per_epoch]
        there = {p for s in same_epoch for p in plain.problems(s)} & {*plan.anchors(cycle)}
        assert len({*plan.problems(first)} & there) == min(4, len(there))
        if anchors is None:
            assert plan.problems(first) == plain.problems(first)


def test_an_anchor_takes_the_place_of_a_retired_problem_where_its_rollouts_are_known():
    recipe = {"cycles": 2, "steps_per_cycle": 3, "problems_per_step": 4, "anchors": 8}
    recipe |= {"population_size": 2, "group_size": 4}
    plan = Plan(FSTConfig(**recipe, reuse_rollouts=True, retire_solved=0.9), 40)
    own, anchors = plan.problems(0), {*plan.anchors(0)}
    gone = [SimpleNamespace(step=0, group_rewards=[(problem, 1.0) for problem in own[:3]])]
    batch = {*step_problems(plan, 0, gone).batch}
    assert len(batch) == 4
    assert batch <= anchors - {*own[:3]}
    assert not {*step_problems(plan, 1, gone).batch} - {*plan.problems(1)}
    assert plan.budget(0).reused_rollouts == 2 * 4 * 2


def test_the_document_is_read_once_a_cycle_and_only_for_the_groups_of_the_step_s_own_problems(tmp_path, monkeypatch):
    read = []
    document = RunDirectory.document
    monkeypatch.setattr(RunDirectory, "document", lambda run, name: read.append(name) or document(run, name))
    recipe = {"reuse_rollouts": True, "resample_flat": 2, "checkpoint_every": 2, "cycles": 1}
    compile_relay(tmp_path / "run", metric=lambda gold, pred, trace=None: 0.5, max_unmoved_steps=None, **recipe)
    steps = [event["report"] for event in read_events(tmp_path / "run") if event["event"] == "step"]
    assert len(steps) == 2
    assert steps[0]["counts"]["resampled_groups"] > 0
    assert read.count(DOCUMENT) == 1


def test_the_plan_says_what_a_step_may_take_over():
    recipe = {"cycles": 3, "problems_per_step": 8, "anchors": 5, "population_size": 2, "group_size": 4}
    off, on = (Plan(FSTConfig(**recipe, reuse_rollouts=on), 200).budget(0) for on in (False, True))
    assert (off.reused_rollouts, on.reused_rollouts) == (0, 3 * 5 * 2)
    assert replace(on, reused_rollouts=0) == off


@pytest.mark.parametrize(("method", "words"), [("rl", 1), ("gepa", 1), ("rl_then_gepa", 1), ("fst", 0)])
def test_where_no_step_follows_a_search_it_is_said_before_work(method, words):
    config = FSTConfig(method=method, reuse_rollouts=True)
    assert len(settings_without_effect(config)) == words
    assert Plan(config, 400).budget(0).reused_rollouts == (8 * 32 * 4 if method == "fst" else 0)
    assert settings_without_effect(FSTConfig(method=method)) == []


def test_options_of_updates_are_warned_of_where_no_update_is_made_and_a_share_without_its_penalty():
    options = {"resample_flat": 2, "retire_solved": 0.9, "overlong_penalty": 1.0}
    (warning,) = settings_without_effect(FSTConfig(method="gepa", **options))
    assert warning.startswith(
        "resample_flat=2 and retire_solved=0.9 and overlong_penalty=1 do nothing under method='gepa'"
    )
    (warning,) = settings_without_effect(FSTConfig(method="gepa", retire_solved=0.9))
    assert warning.startswith("retire_solved=0.9 does nothing under method='gepa'")
    (warning,) = settings_without_effect(FSTConfig(method="gepa", updates_per_batch=4))
    assert warning.startswith("updates_per_batch=4 does nothing under method='gepa'")
    (warning,) = settings_without_effect(FSTConfig(overlong_share=0.5))
    assert warning.startswith("overlong_share=0.5 does nothing at overlong_penalty=0")
    assert settings_without_effect(FSTConfig(method="rl", **options, overlong_share=0.5)) == []


def test_a_step_without_groups_takes_nothing_over():
    distill = {"method": "distill", "seed_kl_coefficient": 1.0, "seed_kl_teacher": "population"}
    with pytest.raises(ConfigurationError, match=r"learns from no reward, and reuse_rollouts=True would do nothing"):
        FSTConfig.checked({**distill, "reuse_rollouts": True})


# ---- groups --------------------------------------------------------------------------------------

PROBLEMS = [Problem(i, dspy.Example(question=str(i), answer="yes").with_inputs("question")) for i in range(3)]


class Asks(dspy.Module):
    def __init__(self):
        super().__init__()
        self.say = dspy.Predict(dspy.Signature("question -> answer", "Answer."))

    def forward(self, question):
        return self.say(question=question)


def rollouter_of(program):
    """A rollouter whose replies name the seed of their call, and the seeds that it gave."""
    seeds = []

    def speak(messages, seed):
        seeds.append(seed)
        return fields(answer=f"yes {seed}")

    policy, _ = scripted_policy(speak, version="step-000000")
    program.set_lm(policy)
    return Rollouter(program, Reward(lambda gold, pred, trace=None: 1.0), RolloutSettings(num_threads=1)), seeds


def candidate(text):
    return Candidate({"say": text})


A, B = candidate("A"), candidate("B")


@pytest.mark.parametrize(
    ("members", "size", "banked", "fresh"),
    [
        ((A, B), 4, [(0, A), (0, B), (1, B)], {0: 2, 1: 3, 2: 4}),
        ((A,), 2, [(0, A), (2, A)], {0: 1, 1: 2, 2: 1}),
        ((A, A, B), 3, [(0, A), (0, B), (1, A)], {0: 1, 1: 2, 2: 3}),  # a repeated member takes it once
        ((A, B), 2, [(p, c) for p in range(3) for c in (A, B)], {0: 0, 1: 0, 2: 0}),
        ((A, B), 2, [], {0: 2, 1: 2, 2: 2}),
    ],
    ids=["two", "one", "repeated", "all", "none"],
)
def test_a_known_rollout_takes_one_place_and_the_others_are_sampled_as_without_it(members, size, banked, fresh):
    rollouter, seeds = rollouter_of(Asks())
    population = Population(members, (None,) * len(members))
    whole = rollouter.groups(PROBLEMS, population, size, "step-0")
    all_seeds, known = [*seeds], [replace(make_rollout(0.5, problem=p), candidate=c) for p, c in banked]
    seeds.clear()
    groups = rollouter.groups(PROBLEMS, population, size, "step-0", known=known)
    assert len(seeds) == sum(fresh.values())
    assert {*seeds} <= {*all_seeds}
    for before, now in zip(whole, groups, strict=True):
        kept = [rollout for rollout in now.rollouts if rollout in known]
        assert len(now.rollouts) - len(kept) == fresh[now.problem]
        assert [r.candidate for r in now.rollouts] == [r.candidate for r in before.rollouts]
        told_again = {r.prediction.answer for r in now.rollouts if r not in known}
        assert told_again <= {r.prediction.answer for r in before.rollouts}


# ---- what is handed over -------------------------------------------------------------------------


def played(problem, of, reward, version="step-000000", mask=None):
    rollout = make_rollout(reward, make_call(weights=version, logprobs=[-0.1, -1 / 3]), problem=problem, mask=mask)
    return replace(rollout, candidate=of)


def search_of(*rollouts, members=(A, B)):
    return SimpleNamespace(scoring=rollouts, population=Population(members, (None,) * len(members)))


def handed_on(tmp_path, search, metric="one", **asked):
    """What step 6 takes over from this search, through the disk."""
    run = RunDirectory(tmp_path / "run", {"a": 1})
    documents = Reuse(run, Asks(), "one", {6, 7}).handed_over(search, 6, {0, 1})
    run.commit(lambda folder: folder.mkdir(), documents, step=6)
    run.close()
    again = RunDirectory(tmp_path / "run", {"a": 1})
    reuse = Reuse(again, Asks(), metric, {6, 7})
    asked = {"step": 6, "population": search.population, "weights": "step-000000", **asked}
    known = reuse.known(**asked)
    again.close()
    return known, reuse.counted(Batch((), "", counts=Counter(rollouts=8)), [Group(r.problem, (r,)) for r in known])


def test_what_the_members_did_on_the_step_s_problems_is_handed_on_as_it_was(tmp_path):
    other = candidate("C")
    kept = [played(0, A, 1.0), played(1, A, 0.25), played(1, B, 0.0)]
    lost = [played(0, B, None, mask="timeout"), played(0, B, None, mask="timeout")]
    search = search_of(kept[0], lost[0], played(0, other, 1.0), kept[1], kept[2], played(2, A, 1.0), lost[1])
    known, batch = handed_on(tmp_path, search)
    assert known == [replace(rollout, reused=True) for rollout in kept]
    assert batch.counts == {"rollouts": 8, "reused": 3, "not reused: masked": 1}


def test_a_rollout_that_was_masked_and_made_again_is_the_second_one(tmp_path):
    known, batch = handed_on(tmp_path, search_of(played(0, A, None, mask="timeout"), played(0, A, 1.0)))
    assert [rollout.reward for rollout in known] == [1.0]
    assert batch.counts == {"rollouts": 8, "reused": 1}


def test_a_failure_of_a_reused_rollout_is_one_failure_of_the_run(tmp_path):
    """The search counted it, and the step's own rules need it too: of its 3 failures one was the search's."""
    failed = replace(played(0, A, 0.0), outcome=Outcome("failed", "parse"))
    _, batch = handed_on(tmp_path, search_of(failed, played(1, A, 1.0)))
    assert batch.counts == {"rollouts": 8, "reused": 2, "reused failed: parse": 1}
    steps = [SimpleNamespace(counts={**batch.counts, "failed: parse": 3})]
    record = replace(RunRecord("run", "running"), cycles=[SimpleNamespace(counts={"failed: parse": 2})], steps=steps)
    assert record.lost == {"failed: parse": 2 + 2}


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({"weights": "step-000001"}, {"not reused: other weights": 2}),
        ({"metric": "another"}, {"not reused: another metric": 2}),
        ({"step": 7}, {}),
        ({"population": Population((candidate("D"),), (None,))}, {}),
    ],
    ids=["weights", "metric", "a-later-step", "population"],
)
def test_what_other_weights_or_another_metric_made_is_sampled_again_and_counted(tmp_path, changes, counts):
    known, batch = handed_on(tmp_path, search_of(played(0, A, 1.0), played(1, B, 0.0)), **changes)
    assert known == []
    assert batch.counts == {"rollouts": 8, **counts}


def test_calls_come_back_exactly_and_a_value_that_json_cannot_hold_costs_the_trace_alone():
    rollouter, _ = rollouter_of(Asks())
    (rollout,) = rollouter.rollout([Task(PROBLEMS[0], read_texts(rollouter.program))], "test")
    rollout = replace(rollout, failed_in="say", predictor_scores={"say": 1 / 3})
    bare = json.loads(json.dumps(rollouts_to_json([rollout])))
    assert "calls" not in bare[0]  # the journal of a run without the option is what it was
    for data in (json.loads(json.dumps(rollouts_to_json([rollout], calls=True)))[0], trainable_to_json(rollout)):
        (again,) = rollouts_from_json(json.loads(json.dumps([data])), [rollout.candidate], rollouter.program)
        assert replace(again, prediction=None, trace=()) == replace(rollout, prediction=None, trace=())
        assert [entry[1:] for entry in again.trace] == [entry[1:] for entry in rollout.trace]
    opaque = replace(rollout, prediction=dspy.Prediction(answer=object()))
    assert rollouts_to_json([opaque], calls=True) is None
    (again,) = rollouts_from_json([trainable_to_json(opaque)], [rollout.candidate], rollouter.program)
    assert again == replace(rollout, prediction=None, trace=())


# ---- whole runs ----------------------------------------------------------------------------------


class KilledError(Exception):
    pass


def killer(when):
    def listen(event):
        if when(event):
            raise KilledError

    return listen


class Fresh:
    """Counts the rollouts that a run samples for each of its steps."""

    def __init__(self):
        self.step, self.sampled = None, Counter()

    def __call__(self, event):
        if event["event"] == "phase":
            words = event["phase"].removeprefix("step ").removesuffix(": rollouts")
            self.step = int(words) if words.isdecimal() else None
        elif event["event"] == "rollout" and self.step is not None:
            self.sampled[self.step] += 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder, fresh = tmp_path_factory.mktemp("reuse") / "whole", Fresh()
    return compile_relay(folder, reuse_rollouts=True, listeners=[fresh]), folder, fresh.sampled


def test_the_step_after_a_search_samples_what_the_search_has_not(whole):
    """4 of its 6 problems are anchors, each with one known rollout of each different member."""
    _, folder, sampled = whole
    events = read_events(folder)
    populations = {e["report"]["cycle"]: {*e["report"]["population"]} for e in events if e["event"] == "cycle"}
    steps = [event["report"] for event in events if event["event"] == "step"]
    for step in steps:
        reused = 4 * len(populations[step["cycle"]]) if step["step"] % 2 == 0 else None
        assert step["counts"].get("reused") == reused
        assert step["counts"]["rollouts"] == 6 * 4 == sampled[step["step"]] + (reused or 0)
        assert step["update"]["max_log_ratio"] < 1e-4  # the search's calls have the log-probabilities of these weights
    costs = record_of(events).costs
    assert costs.training_rollouts == sampled.total()
    assert record_of(events).spent[-1].rollouts == costs.rollouts
    assert costs.training_tokens == sum(step["sampled_tokens"] for step in steps)
    assert steps[0]["sampled_tokens"] < sum(each["tokens"] for each in steps[0]["predictors"].values())
    assert steps[1]["sampled_tokens"] == sum(each["tokens"] for each in steps[1]["predictors"].values())


def test_what_was_reused_is_told(whole):
    record = record_of(read_events(whole[1]))
    (step, *_) = record.steps
    words = step_words({"counts": step.counts, "update": {}})
    assert words == f", {step.counts['reused']} rollouts of the search reused"
    count = sum(step.counts.get("reused", 0) for step in record.steps)
    assert option_lines(record.steps) == [
        f"reuse_rollouts: {count} of the 96 rollouts of groups were those of a search, and paid for there."
    ]
    assert [chart.name for chart in option_charts([record])] == ["reused-rollouts"]
    assert record.budget["reused_rollouts"] == 2 * 4 * 2


@pytest.mark.slow
def test_killed_before_and_after_the_search_was_committed_it_ends_as_if_nobody_had_touched_it(whole, tmp_path):
    compiled, folder, _ = whole
    deaths = [
        lambda event: event["event"] == "cycle" and event["report"]["cycle"] == 1,  # goes on from the journal
        lambda event: event.get("phase") == "step 2: rollouts",  # goes on from the state's document
    ]
    for death in deaths:
        with pytest.raises(KilledError):
            compile_relay(tmp_path / "run", reuse_rollouts=True, listeners=[killer(death)])
    assert list((tmp_path / "run").glob(f"states/*/{DOCUMENT}"))
    resumed = compile_relay(tmp_path / "run", reuse_rollouts=True)
    assert same_weights(compiled, resumed)
    assert compiled.population == resumed.population
    assert [told(e) for e in read_events(folder)] == [told(e) for e in read_events(tmp_path / "run")]


def test_a_search_that_another_metric_judged_is_made_anew(tmp_path):
    """Killed in its last act: without this its rewards of 0 came back as those of the metric that gives 1."""
    settings = {**SHORT, "cycles": 1, "steps_per_cycle": 1, "reuse_rollouts": True, "max_unmoved_steps": None}

    def compiled(metric, *listeners):
        optimizer = FSTOptimizer(metric=metric, propose=propose, run_dir=tmp_path, listeners=[*listeners], **settings)
        optimizer.compile(relay(), trainset=build(train=32, val=1, test=1).trainset)

    with pytest.raises(KilledError):
        compiled(lambda gold, pred, trace=None: 0.0, killer(lambda event: event["event"] == "cycle"))
    compiled(lambda gold, pred, trace=None: min(1.0, 1.0))
    events = read_events(tmp_path)
    (step,) = [event["report"] for event in events if event["event"] == "step"]
    assert step["counts"]["reused"] > 0
    assert {reward for _, reward in step["group_rewards"]} == {1.0}
    told = [event["text"] for event in events if event["event"] == "warning"]
    assert any("its search begins anew, because another metric judged the" in text for text in told)
