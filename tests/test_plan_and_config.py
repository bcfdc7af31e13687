"""The recipe's faults, and which problems a step sees."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from dspy_fst.config import Alternation, FSTConfig, WarmStart, make_config
from dspy_fst.errors import ConfigurationError
from dspy_fst.fast.search_settings import SearchSettings
from dspy_fst.recipe.declared import Settings, no_such_setting, sentences
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.training.plan import Plan


def test_the_defaults_are_the_paper_s():
    config = FSTConfig()
    assert (config.steps_per_cycle, config.population_size, config.group_size) == (6, 4, 8)
    assert (config.lookahead, config.anchor_count) == (192, 192)
    assert Plan(config, 1000).search_budget(0) == 960
    assert (config.importance_cap, config.kl_coefficient, config.warmup_steps) == (4.0, 0.001, 10)


def test_every_fault_is_told_at_once():
    config, faults = make_config({"cycles": 0, "learning_rate": -1, "lerning_rate": 1e-4})
    assert config is None
    assert len(faults) == 3
    text = " ".join(faults)
    assert all(name in text for name in ("cycles=0", "learning_rate=-1", "lerning_rate"))


def test_a_group_that_does_not_divide_names_the_sizes_that_do():
    faults = make_config({"group_size": 10, "population_size": 4})[1]
    assert len(faults) == 1
    assert "group_size=8 or 12" in faults[0]


def test_an_epoch_shows_every_problem_once():
    plan = Plan(FSTConfig(problems_per_step=5), size=20)
    seen = [problem for step in range(4) for problem in plan.problems(step)]
    assert sorted(seen) == list(range(20))
    assert plan.problems(4) != plan.problems(0)


@settings(max_examples=40)
@given(size=st.integers(4, 60), step=st.integers(0, 200))
def test_a_batch_never_repeats_a_problem(size, step):
    problems = Plan(FSTConfig(problems_per_step=4), size).problems(step)
    assert len(set(problems)) == 4
    assert set(problems) <= set(range(size))


def test_the_budget_follows_the_anchors_that_there_are():
    assert Plan(FSTConfig(), 40).search_budget(0) == 5 * len(Plan(FSTConfig(), 40).anchors(0))
    assert Plan(FSTConfig(search_passes=1e-6), 40).search_budget(0) == 3


@settings(max_examples=40)
@given(size=st.integers(4, 60), seed=st.integers(0, 5), cycle=st.integers(0, 3))
def test_a_step_is_a_function_of_seed_and_index(size, seed, cycle):
    config = FSTConfig(problems_per_step=4, steps_per_cycle=3, anchors=6, seed=seed)
    one, other = Plan(config, size), Plan(config, size)
    other.problems(7)  # asked in another order
    assert one.problems(cycle * 3 + 1) == other.problems(cycle * 3 + 1)
    assert set(one.anchors(cycle)) <= set(one.lookahead(cycle))
    assert len(one.anchors(cycle)) == min(6, len(one.lookahead(cycle)))


def test_going_on_from_somewhere_else_shuffles_anew():
    config = FSTConfig(problems_per_step=4)
    assert Plan(config, 40).problems(0) != Plan(config, 40, origin="a compiled program").problems(0)


def test_baselines_are_schedules_of_the_same_loop():
    def shape(method):
        plan = Plan(FSTConfig(method=method, cycles=3, anchors=10, search_passes=2), 100)
        return [(cycle.search_budget, len(cycle.steps)) for cycle in plan.cycles]

    assert shape("fst") == [(20, 6)] * 3
    assert shape("rl") == [(0, 6)] * 3
    assert shape("gepa") == [(60, 0)]
    assert shape("gepa_then_rl") == [(60, 6), (0, 6), (0, 6)]
    assert shape("rl_then_gepa") == [(0, 6)] * 3 + [(60, 0)]


def test_the_budget_counts_every_phase():
    config = FSTConfig(cycles=2, anchors=10, search_passes=2)
    budget = Plan(config, 100).budget(validation_size=7)
    assert budget.search_rollouts == 40
    assert budget.scoring_rollouts == 10 + 4 * 10
    assert budget.training_rollouts == 2 * 6 * 32 * 8
    assert budget.validation_rollouts == 7 + 28  # the start is one candidate, the end four
    assert budget.updates == 12


def test_the_first_search_may_get_more_and_all_together_spend_the_same():
    def budgets(share):
        config = FSTConfig(cycles=4, anchors=10, search_passes=2, first_search_share=share)
        return [cycle.search_budget for cycle in Plan(config, 100).cycles]

    assert budgets(None) == [20, 20, 20, 20]
    assert budgets(0.7) == [56, 8, 8, 8]
    assert budgets(1) == [80, 0, 0, 0]


def test_rollouts_under_the_seed_are_in_the_budget():
    config = FSTConfig(cycles=2, seed_kl_coefficient=0.1, seed_kl_rollouts=2)
    assert Plan(config, 100).budget(0).training_rollouts == 2 * 6 * 32 * (8 + 2)


def test_a_baseline_of_one_rollout_is_refused():
    with pytest.raises(ValidationError, match="group_size=8"):
        FSTConfig(baseline="candidate", group_size=4, population_size=4)


@pytest.mark.parametrize("room", [SearchSettings, TrainingSettings, RolloutSettings, Alternation])
def test_a_setting_is_declared_once_beside_its_user_and_the_recipe_inherits_it(room):
    assert issubclass(FSTConfig, room)
    declared = set(room.model_fields)
    others = {SearchSettings, TrainingSettings, RolloutSettings, Alternation, FSTConfig} - {room}
    assert not [other for other in others if declared & set(vars(other).get("__annotations__", {}))]
    for name in declared:
        mine, flat = room.model_fields[name], FSTConfig.model_fields[name]
        assert (flat.default, flat.metadata, flat.description) == (mine.default, mine.metadata, mine.description)


def test_settings_are_listed_in_the_order_of_a_cycle():
    names = list(FSTConfig.model_fields)
    parts = [Alternation, WarmStart, SearchSettings, TrainingSettings, RolloutSettings]
    assert names[: sum(len(part.model_fields) for part in parts)] == [n for part in parts for n in part.model_fields]
    assert names[0] == "method"
    assert names[-1] == "seed"


def test_the_recipe_is_read_without_dspy_and_torch():
    code = "import sys, dspy_fst.config; sys.exit(bool({'dspy', 'torch', 'gepa'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_room_s_settings_refuse_a_misspelt_name_as_the_recipe_does():
    for kind in (RolloutSettings, FSTConfig):
        with pytest.raises(ConfigurationError) as error:
            kind.checked({"num_thread": 3, "rollout_timeout_s": 0, "failure_score": True})
        assert set(error.value.faults) == {
            "num_thread: there is no such setting; did you mean 'num_threads'?",
            "rollout_timeout_s=0: Input should be greater than 0",
            "failure_score=True: True and False are no numbers",
        }


class Inner(BaseModel):
    count: int


class Document(Settings):
    inner: Inner
    name: str


def test_the_sentences_of_a_document_hide_its_values_unless_they_are_asked_for():
    with pytest.raises(ValidationError) as error:
        Document.model_validate({"inner": {"count": "sk-secret"}, "sk-key": 1})
    assert sentences(error.value) == [
        "inner.count: Input should be a valid integer, unable to parse string as an integer",
        "name: it is missing",
        "sk-key: Extra inputs are not permitted",
    ]
    told = sentences(
        error.value,
        show=lambda place, value: repr(value) if place == "inner.count" else None,
        unknown=lambda place: no_such_setting("recipe.cycle", ["cycles"]),
    )
    assert told[0].startswith("inner.count='sk-secret': Input should be a valid integer")
    assert told[2] == "recipe.cycle: there is no such setting; did you mean 'cycles'?"
